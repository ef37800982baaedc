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
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch

from fairseq_gradinit.cli.doctor import user_dir

# Models this small lose more to the hand-over between threads than they gain.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def slowness() -> float:
    """How many times slower this machine is than the one that the limit is made for; at least 1."""
    start = time.process_time()
    sum(i * i for i in range(1_000_000))
    return max(1.0, (time.process_time() - start) / 0.06)


# A test of the fast tier may take this many seconds of processor time, of its programs too.
FAST_TEST_SECONDS = 5.0 * slowness()

# Of a program that is started: one thread, no warnings of fairseq's, and less to import.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": str(ROOT / "tests" / "light_imports"),
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that belongs to the slow tier and is not marked so.

    Processor time, unlike time on the clock, does not depend on what else the machine does.
    """
    before = sum(os.times()[:4])
    result = yield
    taken = sum(os.times()[:4]) - before
    if taken > FAST_TEST_SECONDS and item.get_closest_marker("slow") is None:
        pytest.fail(
            f"took {taken:.1f} s of processor time, and a fast test has {FAST_TEST_SECONDS:.1f}: "
            "make it smaller, or mark it with @pytest.mark.slow",
            pytrace=False,
        )
    return result


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
    kept = []
    for i, word in enumerate(usual):
        option = word if word.startswith("--") else usual[i - 1]
        if option not in left_out:
            kept.append(word)
    return kept


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
        assert self.code not in (0, None), self.output
        assert "Traceback" not in self.output, self.output
        (line,) = self.lines("GradInit: ")[-1:] or [self.output]
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


@contextlib.contextmanager
def in_place_of(outcome: Outcome, words: Sequence[object], form: str) -> Iterator[io.StringIO]:
    """What is called inside is a program of these words, whose end and log `outcome` is to be."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    handler.setFormatter(logging.Formatter(form, "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with (
            mock.patch.object(sys, "argv", list(map(str, words))),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(action="ignore"),
        ):
            yield printed
    except SystemExit as leaving:
        outcome.code = leaving.code or 0
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        outcome.output = printed.getvalue()


def run_here(program: str, *arguments: object, stdin: str = "") -> Outcome:
    """Run one of fairseq's programs in this process, where the plugin stays loaded."""
    import fairseq_gradinit.plugin.install  # noqa: F401

    name = program.removeprefix("fairseq-").replace("-", "_")
    module = importlib.import_module(f"fairseq_cli.{name}")
    outcome = Outcome(0, "")
    # As fairseq_cli sets it.
    form = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
    with (
        in_place_of(outcome, [program, *arguments], form) as printed,
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(printed),
    ):
        module.cli_main()
    return outcome


@dataclass(frozen=True)
class Corpus:
    """Binarised sentences of random words; the target is the source reversed."""

    translation: Path
    language_model: Path
    source_text: Path


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
    # Torch imports much when it makes its first optimizer, for seconds that no test is to pay.
    torch.optim.Adam([torch.zeros(1, requires_grad=True)], fused=True)
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, {"train": 400, "valid": 40})
    train, valid = str(folder / "train"), str(folder / "valid")
    pair = ("-s", "de", "-t", "en", "--joined-dictionary")
    return Corpus(
        binarise(folder / "mt", *pair, "--trainpref", train, "--validpref", valid),
        binarise(
            folder / "lm",
            *("--only-source", "--trainpref", f"{train}.de", "--validpref", f"{valid}.de"),
        ),
        folder / "valid.de",
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

    def add(tensor):
        found.update(tensor.contiguous().numpy().tobytes())
        return tensor

    utils.apply_to_sample(add, sample)
    return found.hexdigest()


def train_here(
    data: Path,
    save_dir: Path,
    *arguments: object,
    base: Sequence[str] = (),
    plugin: bool = True,
) -> Training:
    """Run fairseq-train as `train` does, but in this process, where the plugin stays loaded.

    Without `plugin` it is not loaded, so that has to come first in a process of its own.
    """
    import fairseq_cli.train as program

    if plugin:
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
    words = ["fairseq-train", data, *base, "--save-dir", save_dir, *arguments]
    with (
        in_place_of(seen, words, "%(levelname)s | %(name)s | %(message)s"),
        mock.patch.object(program, "Trainer", RecordingTrainer),
    ):
        program.cli_main()
    return seen


@contextlib.contextmanager
def nearly_full_disk(limit: int) -> Iterator[None]:
    """No file can become longer; what does not fit is cut off, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Disk:
    """A small file system in memory, at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, kib: int, *, new: bool = False) -> None:
        options = f"{'' if new else 'remount,'}size={kib}k"
        # Not `run`, which a test replaces.
        if subprocess.call(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder]) != 0:
            pytest.skip("no file system can be mounted here")

    def fill(self, leave: int = 0) -> None:
        """Fill it to the brim, or but for so many KiB."""
        filler = self.folder / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(filler, filler.stat().st_size - 1024 * leave)

    def contents(self) -> dict[str, bytes]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in files
            if path.name != "filler"
        }


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    found = Disk(folder)
    found.resize(1024, new=True)
    yield found
    subprocess.check_call(["umount", folder])
