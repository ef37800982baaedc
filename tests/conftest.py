"""A small corpus that can be learned, and fairseq's command lines run as a user runs them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch

from fairseq_gradinit.cli.doctor import user_dir

# Models this small lose more to the hand-over between threads than they gain.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


# Of a program that is started: one thread, no warnings of fairseq's, and less to import.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": str(ROOT / "tests" / "light_imports"),
}


SMALL_MODEL = [
    *("--arch", "transformer_iwslt_de_en"),
    *("--encoder-layers", "1", "--decoder-layers", "1"),
    *("--encoder-embed-dim", "16", "--decoder-embed-dim", "16"),
    *("--encoder-ffn-embed-dim", "32", "--decoder-ffn-embed-dim", "32"),
]
SHORT_TRAINING = [
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", "1e-3"),
    *("--lr-scheduler", "polynomial_decay", "--warmup-updates", "0", "--total-num-update", "100"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--max-tokens", "400", "--max-update", "4", "--cpu", "--disable-validation"),
    *("--log-format", "simple", "--log-interval", "1", "--num-workers", "0"),
    # Without the thread that reads ahead, which at times aborts a process that is done.
    *("--data-buffer-size", "0"),
]
PLUGIN = ["--user-dir", user_dir()]
GRADINIT = ["--gradinit", "--gradinit-iterations", "3"]
SCALES_ALONE = ["--gradinit-centering", "off", "--gradinit-encoder-branches", "1"]
OWN_USER_DIR = ["--user-dir", str(ROOT / "tests" / "own_user_dir")]


def usual_options(*left_out: str) -> list[str]:
    """The small model and its short training, without some options and their values."""
    usual = [*SMALL_MODEL, *SHORT_TRAINING]
    options = [word if word.startswith("--") else before for before, word in pairwise(["", *usual])]
    return [word for word, option in zip(usual, options, strict=True) if option not in left_out]


@dataclass
class Outcome:
    """What a command line did: its exit code and all that it printed."""

    code: int
    output: str

    def lines(self, needle: str) -> list[str]:
        return [line for line in self.output.splitlines() if needle in line]

    @property
    def updates(self) -> list[str]:
        """What the log says of every update, but for times and speeds."""
        columns = r"\b(?:loss|nll_loss|ppl|wpb|bsz|num_updates|lr|gnorm)=\S+"
        return [" ".join(re.findall(columns, line)) for line in self.lines("num_updates=")]

    def error(self) -> str:
        """The one sentence that a mistake was answered with."""
        assert self.code != 0, self.output
        assert "Traceback" not in self.output, self.output
        line = self.lines("GradInit: ")[-1]
        assert "ERROR" in line, self.output
        return line.partition("GradInit: ")[2]


def run_command(
    program: str, *arguments: object, stdin: str | None = None, cwd: Path | str = "/", **env: str
) -> Outcome:
    """Run a program of the environment that the tests run in, by default in a folder not ours."""
    done = subprocess.run(
        [str(BIN / program), *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **env},
        timeout=300,
        check=False,
    )
    return Outcome(done.returncode, done.stdout + done.stderr)


def call_here(outcome: Outcome, program: str, *arguments: object, stdin: str = "") -> None:
    """Call a program of fairseq's in this process, and note its end and output."""
    name = program.removeprefix("fairseq-").replace("-", "_")
    module = importlib.import_module(f"fairseq_cli.{name}")
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    # As fairseq_cli sets it.
    form = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
    handler.setFormatter(logging.Formatter(form, "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with (
            mock.patch.object(sys, "argv", [program, *map(str, arguments)]),
            mock.patch.object(sys, "stdin", io.StringIO(stdin)),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(action="ignore"),
        ):
            module.cli_main()
    except SystemExit as leaving:
        outcome.code = leaving.code or 0
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        outcome.output = printed.getvalue()


def run_here(program: str, *arguments: object, stdin: str = "") -> Outcome:
    """Run one of fairseq's programs in this process, where the plugin stays loaded."""
    import fairseq_gradinit.plugin.install  # noqa: F401

    outcome = Outcome(0, "")
    call_here(outcome, program, *arguments, stdin=stdin)
    return outcome


@dataclass(frozen=True)
class Corpus:
    """Binarised sentences of random words; the target is the source reversed."""

    translation: Path
    language_model: Path


def write_manifest(corpus: Path, text_digest: str, **moses: bool) -> None:
    """As much of data-prep's manifest as is read by others; with `moses`, its settings."""
    tokenisation = {"name": "moses+bpe", "moses": moses} if moses else {"name": "sentencepiece"}
    manifest = {
        "corpus": corpus.name,
        "direction": ["de", "en"],
        "outputs": {"text/train.de": text_digest},
        "tokenisation": tokenisation,
    }
    (corpus / "manifest.json").write_text(json.dumps(manifest))


def write_corpus(folder: Path, sentences: dict[str, int]) -> None:
    rng = random.Random(1)
    words = [f"w{i}" for i in range(40)]
    for split, count in sentences.items():
        pairs = [[rng.choice(words) for _ in range(rng.randint(3, 9))] for _ in range(count)]
        source = [" ".join(pair) for pair in pairs]
        target = [" ".join(word.upper() for word in reversed(pair)) for pair in pairs]
        (folder / f"{split}.de").write_text("\n".join(source) + "\n")
        (folder / f"{split}.en").write_text("\n".join(target) + "\n")


def binarise(folder: Path, *arguments: str) -> Path:
    done = run_here("fairseq-preprocess", *arguments, "--destdir", folder)
    assert done.code == 0, done.output
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, {"train": 400, "valid": 40})

    def binarised(name: str, ending: str, *options: str) -> Path:
        train, valid = (str(folder / f"{split}{ending}") for split in ("train", "valid"))
        return binarise(folder / name, *options, "--trainpref", train, "--validpref", valid)

    return Corpus(
        binarised("mt", "", "-s", "de", "-t", "en", "--joined-dictionary"),
        binarised("lm", ".de", "--only-source"),
    )


def train(data: Path, save_dir: Path, *arguments: object, base: Sequence[str] = ()) -> Outcome:
    """Run fairseq-train on the small model; `arguments` come last, and so override the rest."""
    base = base or [*SMALL_MODEL, *SHORT_TRAINING]
    return run_command("fairseq-train", data, *base, "--save-dir", save_dir, *arguments)


@dataclass
class Training(Outcome):
    """A run of fairseq-train in this process, and what its trainer saw.

    Attributes:
        trainer: fairseq's trainer as the run left it.
        initial: the model's tensors when the trainer was made.
        first: the model's tensors at the beginning of the first update.
        batches: a hash of the data of every update.
    """

    trainer: object = None
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    first: dict[str, torch.Tensor] = field(default_factory=dict)
    batches: list[str] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.trainer.get_model())


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def digest(sample: object) -> str:
    """A hash of every tensor in a nested sample."""
    from fairseq import utils

    found = hashlib.blake2b(digest_size=8)

    utils.apply_to_sample(lambda x: found.update(x.contiguous().numpy().tobytes()), sample)
    return found.hexdigest()


def train_here(
    data: Path, save_dir: Path, *arguments: object, base: Sequence[str] = ()
) -> Training:
    """Run fairseq-train as `train` does, but in this process, where the plugin stays loaded."""
    import fairseq_cli.train as program

    import fairseq_gradinit.plugin.install  # noqa: F401

    seen = Training(0, "")

    class RecordingTrainer(program.Trainer):
        def __init__(self, cfg, task, model, criterion, quantizer=None):
            super().__init__(cfg, task, model, criterion, quantizer)
            seen.trainer, seen.initial = self, tensors_of(self.get_model())

        def train_step(self, samples, raise_oom=False):
            seen.first = seen.first or tensors_of(self.get_model())
            seen.batches.append(" ".join(map(digest, samples)))
            return super().train_step(samples, raise_oom)

    base = base or [*SMALL_MODEL, *SHORT_TRAINING]
    with mock.patch.object(program, "Trainer", RecordingTrainer):
        call_here(seen, "fairseq-train", data, *base, "--save-dir", save_dir, *arguments)
    return seen
