"""A small corpus that can be learned, and fairseq's command lines run as a user runs them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

SMALL_MODEL = [
    *("--arch", "transformer_iwslt_de_en"),
    *("--encoder-layers", "2", "--decoder-layers", "2"),
    *("--encoder-embed-dim", "32", "--decoder-embed-dim", "32"),
    *("--encoder-ffn-embed-dim", "64", "--decoder-ffn-embed-dim", "64"),
]
SHORT_TRAINING = [
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", "1e-3"),
    *("--lr-scheduler", "polynomial_decay", "--warmup-updates", "0", "--total-num-update", "100"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--max-tokens", "400", "--max-update", "4", "--cpu", "--disable-validation"),
    *("--log-format", "simple", "--log-interval", "1", "--num-workers", "0"),
]
PLUGIN = ["--user-dir", "fairseq_gradinit"]
GRADINIT = [*PLUGIN, "--gradinit", "--gradinit-iterations", "3"]


@dataclass(frozen=True)
class Outcome:
    """What a command line did: its exit code and all that it printed."""

    code: int
    output: str

    def lines(self, needle: str) -> list[str]:
        return [line for line in self.output.splitlines() if needle in line]


def run_command(program: str, *arguments: object, stdin: str | None = None, **env: str) -> Outcome:
    """Run a program of the environment that the tests run in, from a folder that is not ours."""
    done = subprocess.run(
        [str(BIN / program), *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **env},
        timeout=300,
        check=False,
    )
    return Outcome(done.returncode, done.stdout + done.stderr)


@dataclass(frozen=True)
class Corpus:
    """Binarised sentences of random words; the target is the source reversed."""

    translation: Path
    language_model: Path
    source_text: Path


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
    done = run_command("fairseq-preprocess", *arguments, "--destdir", folder)
    assert done.code == 0, done.output
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
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
