"""Run fairseq's own tests of its programs without the plugin, with it, and with GradInit.

    python benchmarks/fairseq_suite.py CHECKOUT [--ways NAME ...] [--classes CLASS ...]

CHECKOUT is a clone of fairseq, of which tests/test_binaries.py is taken, with the examples that it
loads; the fairseq under test is the installed one. Every class of tests has a process of its own,
in each of four ways:

- `stock`: as it is. torch 2.6 and later refuse to load the checkpoints of a fairseq that does not
  ask them to trust the file, so tests that read one fail.
- `stock-unsafe`: the same, with torch's switch that lets it unpickle anything.
- `plugin`: --user-dir fairseq_gradinit.
- `gradinit`: --gradinit too, with few iterations, sentences and small batches, in every training.

In all of them NumPy is given back `numpy.compat`, without which, as NumPy 2 is, fairseq does not
generate from language models.

What counts is the difference. The record is benchmarks/results/fairseq-suite.json, in which a run
replaces what it ran and keeps the rest. The exit code is 1 if a test fails with the plugin and does
not with unsafe loading. A training that GradInit refuses with a sentence counts as refused.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shlex
import sys
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

UNSAFE_LOADING = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
PLUGIN = ("--user-dir", "fairseq_gradinit")
CLASSES = (
    *("TestLanguageModeling", "TestTranslation", "TestStories", "TestOptimizers"),
    *("TestMaskedLanguageModel", "TestActivationCheckpointing"),
)
# The tests train on some hundred tokens, of which a batch must leave another one. Some train twice
# in a folder and count the lines of the log, of which one that goes on from a state has fewer.
SHORTENED = (
    *("--gradinit-iterations", "2", "--gradinit-max-tokens", "100"),
    *("--gradinit-save-interval", "0"),
)
# Language models have blocks of 500 tokens there, of which no batch could be cut in thirds.
SHORT_BLOCKS = {
    "TestLanguageModeling": ("--tokens-per-sample", "20", "--max-target-positions", "1024")
}
# Some of the models have six layers of width 512, and the tests train 80 of them.
SENTENCES = 3


@dataclass(frozen=True)
class Way:
    """How the tests are run: what is added to every command line, and to the environment."""

    name: str
    everywhere: Sequence[str] = ()
    in_training: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)


WAYS = (
    Way("gradinit", PLUGIN, ("--gradinit", *SHORTENED)),
    Way("stock-unsafe", environment=UNSAFE_LOADING),
    Way("plugin", PLUGIN),
    Way("stock"),
)


@dataclass
class Outcome:
    """What a test came to.

    Attributes:
        verdict: passed, failed, refused (by GradInit, with a sentence) or skipped.
        why: the last line of the error, or the reason for skipping.
        learned: trainings in it that learned scales.
    """

    verdict: str
    why: str = ""
    learned: int = 0


class Recorder(unittest.TestResult):
    """Keeps the outcome of every test, which begins with the same random numbers in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, Outcome] = {}
        self.learned = 0

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.learned = 0
        random.seed(1)
        torch.manual_seed(1)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._keep(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._keep(test, "skipped", reason)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self.addError(test, err)

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        refusal = refusal_behind(err[1])
        if refusal is not None:
            self._keep(test, "refused", str(refusal))
        else:
            lines = f"{err[0].__name__}: {err[1]}".strip().splitlines()
            self._keep(test, "failed", lines[-1])

    def _keep(self, test: unittest.TestCase, verdict: str, why: str = "") -> None:
        name = ".".join(test.id().split(".")[-2:])
        self.outcomes[name] = Outcome(verdict, why, self.learned)


def refusal_behind(error: BaseException | None) -> BaseException | None:
    """The GradInitError that the plugin made a sentence in the log and a SystemExit of."""
    while error is not None:
        if type(error).__name__ == "GradInitError":
            return error
        error = error.__context__
    return None


@contextmanager
def options_added(way: Way, test_class: str) -> Iterator[None]:
    """Add the options of `way` to all that the tests of a class have fairseq parse."""
    from fairseq import options

    parse = options.parse_args_and_arch

    @wraps(parse)
    def wrapper(parser: Any, input_args: Sequence[str], **kwargs: Any) -> Any:
        # A user dir of a test's own comes later, and so stays.
        words = [*way.everywhere, *input_args]
        if way.in_training and "--arch" in input_args:
            words += [*way.in_training, *SHORT_BLOCKS.get(test_class, ())]
        return parse(parser, words, **kwargs)

    with mock.patch.object(options, "parse_args_and_arch", wrapper):
        yield


@contextmanager
def counted_and_shortened(recorder: Recorder) -> Iterator[None]:
    """Count the trainings that learn scales, and center their LayerNorms on few sentences."""
    from fairseq_gradinit import phase

    learn: Callable[..., Any] = phase.learn_scales

    @wraps(learn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        learned = learn(*args, **kwargs)
        recorder.learned += 1
        return learned

    with mock.patch.multiple(phase, learn_scales=wrapper, CENTERING_SENTENCES=SENTENCES):
        yield


def run_tests(checkout: Path, way: Way, test_class: str) -> dict[str, Outcome]:
    """Run the tests of a class one way, in a process that is used for nothing else."""
    os.environ.update(way.environment)
    os.chdir(checkout)
    # Last, so that the fairseq of the checkout is not the one that is imported.
    sys.path.append(str(checkout))
    if not hasattr(np, "compat"):
        np.compat = SimpleNamespace(long=int)  # type: ignore[attr-defined]
    logging.captureWarnings(True)
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    from fairseq import utils

    recorder = Recorder()
    if way.everywhere:
        utils.import_user_module(argparse.Namespace(user_dir="fairseq_gradinit"))
    suite = unittest.TestLoader().loadTestsFromName(f"tests.test_binaries.{test_class}")
    with options_added(way, test_class):
        if way.in_training:
            with counted_and_shortened(recorder):
                suite.run(recorder)
        else:
            suite.run(recorder)
    return recorder.outcomes


def report(way: Way, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """What is kept of one way: counts, and each test that did not pass, with the reason."""
    return {
        "tests": len(outcomes),
        **Counter(outcome.verdict for outcome in outcomes.values()),
        "trainings_that_learned_scales": sum(o.learned for o in outcomes.values()),
        "options": shlex.join([*way.everywhere, *way.in_training]),
        "not_passed": {
            name: f"{outcome.verdict}: {outcome.why}"
            for name, outcome in outcomes.items()
            if outcome.verdict != "passed"
        },
    }


def main() -> None:
    """Run the program."""
    # Not above: fairseq does not take a user dir that the process has imported already, and the
    # processes of the tests import this file.
    from record import RESULTS, read, write

    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("checkout", type=Path, help="a clone of fairseq")
    names = [way.name for way in WAYS]
    parser.add_argument("--ways", nargs="+", choices=names, default=names)
    parser.add_argument("--classes", nargs="+", default=CLASSES, help="classes of tests")
    options = parser.parse_args()
    # The record has the command, which need not tell where the clone is.
    sys.argv = ["CHECKOUT" if word == str(options.checkout) else word for word in sys.argv]
    path = RESULTS / "fairseq-suite.json"
    found = read(path)["results"] if path.exists() else {}
    for way, test_class in product(WAYS, options.classes):
        if way.name not in options.ways:
            continue
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            job = process.submit(run_tests, options.checkout.resolve(), way, test_class)
            outcome = report(way, job.result())
        found.setdefault(way.name, {})[test_class] = outcome
        print(way.name, test_class, json.dumps(outcome, indent=1), flush=True)
        write(path, found)
    if worse := regressions(found):
        sys.exit(f"fairseq_suite: worse with the plugin: {json.dumps(worse, indent=1)}")


def regressions(found: dict[str, Any]) -> dict[str, str]:
    """Tests that fail with the plugin and not without; a refusal is not a failure."""

    def failures(way: str) -> dict[str, str]:
        classes = found.get(way, {}).values()
        lists = [outcome["not_passed"].items() for outcome in classes]
        return {test: why for test, why in chain(*lists) if why.startswith("failed")}

    usual = failures("stock-unsafe")
    return {
        f"{way}: {test}": why
        for way in ("plugin", "gradinit")
        for test, why in failures(way).items()
        if test not in usual
    }


if __name__ == "__main__":
    main()
