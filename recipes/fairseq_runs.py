"""fairseq's own programs run as a user runs them, and what they leave read back.

What the quickstart and the training benchmark share: commands, the environment they run in, the
losses in a training log, the translations of a test set and their scores.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

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


# Of fairseq, when a gradient is not finite, and of GradInit, when too many losses are not. Where
# processes were started one by one, torch puts their rank before each line of a traceback.
DIVERGED = re.compile(
    r"^(?:\[rank\d+\]: )?(FloatingPointError.*)|(GradInit: .* more than may be skipped.*)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class TrainingLog:
    """What a log of fairseq-train says.

    Attributes:
        training: pairs of update and base-2 loss, the mean since the line before; the update rises.
        valid: the same on the validation set.
        seconds: wall time, of all processes that trained in turn; what lies between them is no
            part of it.
        gradinit_seconds: wall time of GradInit.
        seconds_per_update, tokens_per_second: medians over the lines; tokens of the target.
        diverged: the line that says that training did.
    """

    training: list[tuple[int, float]]
    valid: list[tuple[int, float]]
    seconds: float | None
    gradinit_seconds: float | None
    seconds_per_update: float | None
    tokens_per_second: float | None
    diverged: str | None

    @classmethod
    def read(cls, log_file: Path) -> TrainingLog:
        """The log in a file; what a run that goes on says again replaces what it said before."""
        text = log_file.read_text(errors="replace")
        training: dict[int, dict[str, str]] = {}
        valid: dict[int, float] = {}
        for kind, row in re.findall(r"\| INFO \| (train_inner|valid) \| (\{.*\})", text):
            try:
                values = json.loads(row)
            except ValueError:
                continue  # A machine that went down, or a disk that was full, left half a line.
            if kind == "valid":
                valid[int(values["valid_num_updates"])] = float(values["valid_loss"])
            else:
                training[int(values["num_updates"])] = values
        taken = re.search(r"scales saved in .* \(([\d.]+) s in all\)", text)
        updates_per_second = _median(row.get("ups") for row in training.values())
        return cls(
            training=sorted((update, float(row["loss"])) for update, row in training.items()),
            valid=sorted(valid.items()),
            seconds=_wall_seconds(text),
            gradinit_seconds=float(taken[1]) if taken else None,
            seconds_per_update=1 / updates_per_second if updates_per_second else None,
            tokens_per_second=_median(row.get("wps") for row in training.values()),
            diverged=_divergence(text),
        )


def _wall_seconds(log: str) -> float | None:
    """fairseq's own count begins anew in a process that goes on from a checkpoint."""
    lines = (
        r"^([-\d]{10} [:\d]{8}) \| INFO \| (?:train_inner|valid|fairseq_cli\.train) \| (\{'_name')?"
    )
    processes: list[list[datetime]] = []
    for time, settings in re.findall(lines, log, re.MULTILINE):
        if settings or not processes:
            processes.append([])
        processes[-1].append(datetime.fromisoformat(time))
    spans = [times[-1] - times[0] for times in processes]
    return sum(spans, timedelta()).total_seconds() if spans else None


def _divergence(log: str) -> str | None:
    for found in DIVERGED.finditer(log):
        reason = found[1] or found[2]
        if "inconsistent between workers" not in reason:
            return reason
        # fairseq says so of norms that are not finite too, which it prints between two rulers.
        table = log[found.end() :].split("-" * 80)[1:2]
        norms = re.findall(r"rank +\d+ = (\S+)", "".join(table))
        if not all(math.isfinite(float(norm)) for norm in norms):
            return f"FloatingPointError: gradient norms of the processes: {', '.join(norms)}"
    return None


def _median(values: Iterable[str | None]) -> float | None:
    found = [float(value) for value in values if value is not None]
    return median(found) if found else None


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
        moses = _manifest(corpus)["tokenisation"].get("moses")
        if moses is None:
            return cls("sentencepiece", moses=False, lowercase=False)
        return cls("subword_nmt", moses=True, lowercase=moses["lowercase"])


@dataclass(frozen=True)
class Corpus:
    """A folder that data-prep/prepare.py made.

    Attributes:
        digest: a hash of the files that training and scoring read.
        plateau: see `unigram_plateau`.
    """

    folder: Path
    digest: str
    plateau: float

    @property
    def name(self) -> str:
        return str(_manifest(self.folder)["corpus"])

    @classmethod
    def read(cls, folder: Path) -> Corpus:
        """Look at a folder.

        Raises:
            RunError: it is not such a folder.
        """
        try:
            manifest = _manifest(folder)
            outputs = json.dumps(manifest["outputs"], sort_keys=True)
            digest = hashlib.sha256(outputs.encode()).hexdigest()
            _, target = direction(folder)
            dictionary = (folder / "data-bin" / f"dict.{target}.txt").read_text(encoding="utf-8")
            entries = [line.rpartition(" ")[0] for line in dictionary.splitlines()]
            train, valid = (
                map(str.split, _lines(folder / "subwords" / f"{part}.{target}"))
                for part in ("train", "valid")
            )
        except (OSError, ValueError, KeyError) as error:
            what = f"{type(error).__name__}: {error}"
            raise RunError(f"{folder} is no corpus of data-prep/prepare.py ({what})") from error
        return cls(folder, digest, unigram_plateau(train, valid, entries))


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


def direction(corpus: Path) -> tuple[str, str]:
    """Source and target language of the corpus in a folder."""
    source, target = _manifest(corpus)["direction"]
    return source, target


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def unigram_plateau(
    train: Iterable[Sequence[str]], valid: Iterable[Sequence[str]], dictionary: Collection[str]
) -> float:
    """The validation loss of the best model that sees neither source nor context.

    Fairseq's loss of predicting q where y is right, with e = LABEL_SMOOTHING, V entries in the
    vocabulary and e' = e / (V - 1), is

        (1 - e - e') * -log2 q(y)  +  e' * sum over all v of -log2 q(v).

    Its mean over the training tokens, with relative frequencies p, is lowest for
    q(v) = (1 - e - e') p(v) + e'. This is the mean of the loss of that q over the validation
    tokens. Each sentence ends with </s>, and what is not in the dictionary is <unk>.
    """
    vocabulary = {"<s>", "<pad>", "</s>", "<unk>", *dictionary}

    def frequencies(sentences: Iterable[Sequence[str]]) -> dict[str, float]:
        tokens = chain.from_iterable([*sentence, "</s>"] for sentence in sentences)
        counts = Counter(token if token in vocabulary else "<unk>" for token in tokens)
        return {token: count / counts.total() for token, count in counts.items()}

    rest = LABEL_SMOOTHING / (len(vocabulary) - 1)
    main = 1 - LABEL_SMOOTHING - rest
    p = frequencies(train)
    bits = {token: -math.log2(main * p.get(token, 0.0) + rest) for token in vocabulary}
    right = math.fsum(share * bits[token] for token, share in frequencies(valid).items())
    # The order of a set differs between processes, and with it the last digit of a plain sum.
    return main * right + rest * math.fsum(bits.values())


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


class Row(NamedTuple):
    """A sentence of a translated test set: plain text, and the translation as tokens."""

    source: str
    reference: str
    translation: str
    tokens: str


def read_translations(generated: Path, corpus: Path, subset: str = "test") -> list[Row]:
    """The translations in a file of fairseq-generate, in the order of the test set.

    What Moses did to the translations is undone.
    """
    source, reference = (
        _lines(corpus / "text" / f"{subset}.{language}") for language in direction(corpus)
    )
    hypotheses: dict[int, str] = {}
    for line in generated.read_text(encoding="utf-8").split("\n"):
        if line.startswith("H-"):
            number, _, hypothesis = line.removeprefix("H-").split("\t")
            hypotheses[int(number)] = hypothesis
    if sorted(hypotheses) != list(range(len(reference))):
        raise RunError(f"{generated} does not hold each of the {len(reference)} sentences")
    tokens = [hypotheses[number] for number in range(len(reference))]
    moses = Tokenisation.read(corpus).moses
    translations = detokenise(tokens, direction(corpus)[1]) if moses else tokens
    return list(map(Row, source, reference, translations, tokens))


def score(corpus: Path, references: Sequence[str], hypotheses: Sequence[str]) -> Scores:
    """BLEU and chrF of translations, one reference for each; case counts if the corpus has it."""
    lowercase = Tokenisation.read(corpus).lowercase
    metrics = BLEU(lowercase=lowercase), CHRF(lowercase=lowercase)
    bleu, chrf = (metric.corpus_score(hypotheses, [references]).score for metric in metrics)
    signatures = str(metrics[0].get_signature()), str(metrics[1].get_signature())
    return Scores(bleu, chrf, signatures)


@dataclass(frozen=True)
class TokenisedBleu:
    """BLEU of tokens as they are, which papers of before sacrebleu report."""

    bleu: float
    signature: str


def tokenised_bleu(
    corpus: Path, subset: str, hypotheses: Sequence[str], split_compounds: bool
) -> TokenisedBleu | None:
    """What Moses' multi-bleu.perl gives for translations that Moses tokenised; None for others.

    Args:
        hypotheses: tokens with spaces between them.
        split_compounds: cut words at their hyphens first, on both sides, as Vaswani et al. (2017)
            score English-German.
    """
    if not Tokenisation.read(corpus).moses:
        return None
    references = _lines(corpus / "tokens" / f"{subset}.{direction(corpus)[1]}")
    if split_compounds:
        references, hypotheses = map(_without_compounds, (references, hypotheses))
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    return TokenisedBleu(
        metric.corpus_score(hypotheses, [references]).score, str(metric.get_signature())
    )


def _without_compounds(lines: Iterable[str]) -> list[str]:
    """The Moses tokeniser's -a has done some of it: "@-@" stands for those hyphens."""
    return [
        re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", line.replace(" @-@ ", "-")) for line in lines
    ]
