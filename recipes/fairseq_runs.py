"""fairseq's own programs run as a user runs them, and what they leave read back.

What the quickstart and the training benchmark share: commands, the environment they run in, the
losses in a training log, the translations of a test set and their scores.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataprep.moses import detokenise
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

SOURCE, TARGET = "de", "en"
PLUGIN = ["--user-dir", "fairseq_gradinit"]
# With fairseq's default of 8, ve-fairseq 0.12.3 drops the sentences that do not fill a multiple of
# it: 4 of 700 test sentences would get no translation.
ALL_SENTENCES = ["--required-batch-size-multiple", "1"]
TASK = ["--task", "translation", "--source-lang", SOURCE, "--target-lang", TARGET]
MODEL = ["--arch", "transformer_gradinit_tiny", "--dropout", "0.1"]
LABEL_SMOOTHING = 0.1
CRITERION = [
    *("--criterion", "label_smoothed_cross_entropy"),
    *("--label-smoothing", f"{LABEL_SMOOTHING:g}"),
]


class RunError(Exception):
    """A command failed; the message says which, and where its log lies."""


@dataclass(frozen=True)
class Losses:
    """What a log of fairseq-train says; pairs of update and base-2 loss, the update rising.

    Attributes:
        training: the mean since the line before.
        valid: on the validation set.
    """

    training: list[tuple[int, float]]
    valid: list[tuple[int, float]]


@dataclass(frozen=True)
class Scores:
    """Of a translated test set.

    Attributes:
        signatures: sacrebleu's lines for BLEU and chrF, which say how they were computed.
    """

    bleu: float
    chrf: float
    signatures: tuple[str, str]


def program(name: str) -> list[str]:
    """The fairseq command line tool of this name, in the environment of this program."""
    return [str(Path(sys.executable).parent / f"fairseq-{name}")]


def environment() -> dict[str, str]:
    """glibc returns freed memory at every step unless told otherwise: 10 to 30 % of the time."""
    keep = str(1 << 30)
    tuning = {f"MALLOC_{name}_": keep for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD")}
    return {**os.environ, **tuning, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True)
class Tokenisation:
    """How data-prep tokenised a corpus, which is undone before translations are scored.

    Attributes:
        pieces: the kind of pieces that words are cut into, as fairseq calls it.
        moses: whether words are tokens of the Moses tokeniser.
        lowercase: whether they are in lower case, so that case cannot be scored.
    """

    pieces: str
    moses: bool
    lowercase: bool

    @classmethod
    def read(cls, corpus: Path) -> Tokenisation:
        """As the manifest in the folder of a corpus has it."""
        manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
        moses = manifest["tokenisation"].get("moses")
        if moses is None:
            return cls("sentencepiece", moses=False, lowercase=False)
        return cls("subword_nmt", moses=True, lowercase=moses["lowercase"])


def translation_command(corpus: Path, checkpoint: Path, results: Path) -> list[str]:
    """Translates the test set with beam search, into `results`/generate-test.txt."""
    return [
        *program("generate"),
        *(str(corpus / "data-bin"), *PLUGIN, *TASK, "--gen-subset", "test"),
        *("--path", str(checkpoint)),
        *("--beam", "4", "--max-len-a", "1.5", "--max-len-b", "10"),
        *("--max-tokens", "4000", *ALL_SENTENCES),
        *("--remove-bpe", Tokenisation.read(corpus).pieces),
        *("--results-path", str(results)),
    ]


def run_quietly(
    command: Sequence[str],
    log_file: Path,
    start: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
) -> None:
    """Run a command with its output in a file.

    Args:
        start: starts the process, as subprocess.Popen does; to get hold of it.

    Raises:
        RunError: it failed.
    """
    with (
        log_file.open("w") as output,
        start(command, stdout=output, stderr=subprocess.STDOUT, env=environment()) as process,
    ):
        try:
            process.wait()
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise RunError(failure(command, log_file))


def failure(command: Sequence[str], log_file: Path) -> str:
    """What to tell of a command that failed."""
    lines = log_file.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    return f"{Path(command[0]).name} failed: {lines[-1][:300]} (its whole output: {log_file})"


def read_training(log_file: Path) -> Losses:
    """The losses in a log of fairseq-train."""
    training: dict[int, float] = {}
    valid: dict[int, float] = {}
    for line in log_file.read_text(errors="replace").splitlines():
        found = re.search(r"\| INFO \| (train_inner|valid) \| (\{.*\})", line)
        if found is None:
            continue
        values = json.loads(found[2])
        if found[1] == "valid":
            valid[int(values["valid_num_updates"])] = float(values["valid_loss"])
        else:
            training[int(values["num_updates"])] = float(values["loss"])
    return Losses(sorted(training.items()), sorted(valid.items()))


def read_translations(generated: Path, corpus: Path) -> list[tuple[str, str, str]]:
    """Source, reference and translation of each test sentence, in the order of the test set.

    All three are plain text: what Moses did to the translation is undone.
    """
    source, reference = (
        (corpus / "text" / f"test.{language}").read_text().removesuffix("\n").split("\n")
        for language in (SOURCE, TARGET)
    )
    hypotheses: dict[int, str] = {}
    for line in generated.read_text().split("\n"):
        if line.startswith("H-"):
            number, _, hypothesis = line.removeprefix("H-").split("\t")
            hypotheses[int(number)] = hypothesis
    if sorted(hypotheses) != list(range(len(reference))):
        raise RunError(f"{generated} does not hold each of the {len(reference)} sentences")
    translations = [hypotheses[number] for number in range(len(reference))]
    if Tokenisation.read(corpus).moses:
        translations = detokenise(translations, TARGET)
    return list(zip(source, reference, translations, strict=True))


def score(corpus: Path, references: Sequence[str], hypotheses: Sequence[str]) -> Scores:
    """BLEU and chrF of translations, one reference for each; case counts if the corpus has it."""
    lowercase = Tokenisation.read(corpus).lowercase
    metrics = BLEU(lowercase=lowercase), CHRF(lowercase=lowercase)
    bleu, chrf = (metric.corpus_score(hypotheses, [references]).score for metric in metrics)
    signatures = str(metrics[0].get_signature()), str(metrics[1].get_signature())
    return Scores(bleu, chrf, signatures)
