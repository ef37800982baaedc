"""Prepares one corpus from beginning to end: files, text, subwords, binary data, manifest."""

import importlib.metadata
import json
import logging
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataprep import DataPrepError
from dataprep.binary_step import fairseq_version, make_binary
from dataprep.corpora import MOSES_BPE, Corpus
from dataprep.origins import Inputs
from dataprep.steps import StepRecord, code_fingerprint, finished_step, run_step, write_json
from dataprep.subwords_step import (
    DICTIONARY,
    make_bpe_subwords,
    make_sentencepiece_subwords,
    make_tokens,
)
from dataprep.text_step import counts, make_text

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Options:
    """What the user decides.

    Attributes:
        out: the folder that everything is made in.
        languages: those of the corpus, in its order.
        source: the language to translate from.
        target: the language to translate into.
        seed: chooses the held-out pairs.
        tokenisation: one of `corpora.TOKENISATIONS`.
        vocab_size: pieces in the joint vocabulary, or merge operations of BPE.
        mirror: a folder or an address to take files from instead, or None.
        cache: the folder that what is fetched is kept in.
        workers: processes.
        command: what the user typed, for the manifest.
    """

    out: Path
    languages: tuple[str, str]
    source: str
    target: str
    seed: int
    tokenisation: str
    vocab_size: int
    mirror: str | None
    cache: Path
    workers: int
    command: str


@dataclass(frozen=True)
class Steps:
    """The records of all steps of a run; without Moses, there is none of tokens."""

    text: StepRecord
    tokens: StepRecord | None
    subwords: StepRecord
    binary: StepRecord

    def outputs(self) -> dict[str, str]:
        """The SHA-256 of every file."""
        folders = {
            "text": self.text,
            "tokens": self.tokens,
            "subwords": self.subwords,
            "data-bin": self.binary,
        }
        return {
            f"{folder}/{name}": sha
            for folder, record in folders.items()
            if record is not None
            for name, sha in record.files.items()
        }


def prepare(corpus: Corpus, options: Options) -> Path:
    """Make a folder from which fairseq can train, doing only what is not done yet.

    Under `options.out` there will be text/ (detokenised parts, for sacrebleu), tokens/ (after
    Moses, if it is used), subwords/ (vocabulary or codes, and the parts in pieces), data-bin/ (for
    fairseq) and manifest.json.

    Returns:
        The path of the manifest.

    Raises:
        DataPrepError: anything that the user can fix.
    """
    manifest = options.out / MANIFEST
    # What is finished takes no more, and is not refused for want of room.
    if not manifest.exists():
        require_space(options.out, corpus.disk_bytes)
    inputs, text = _kept_text(corpus, options) or _text(corpus, options)
    log_text(text.report)
    moses = options.tokenisation == MOSES_BPE
    tokens = _tokens(corpus, options, text) if moses else None
    subwords = _subwords(options, text, tokens)
    binary = _binary(corpus, options, text, subwords)
    steps = Steps(text, tokens, subwords, binary)
    write_json(manifest, _manifest(corpus, options, inputs, steps))
    return manifest


def require_space(out: Path, needed: int) -> None:
    """Say how much space everything takes, and raise if it is not there.

    Raises:
        DataPrepError: the disk has less, what is there of an earlier run included.
    """
    out.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    free = shutil.disk_usage(out).free
    log.info("this takes some %s of disk space; %s are free", _size(needed), _size(free))
    if free + there < needed:
        raise DataPrepError(
            f"This takes some {_size(needed)} of disk space, and {out} has {_size(free)} free. "
            "Make room, or choose another --out."
        )


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def log_text(report: Mapping[str, Any]) -> None:
    """Tell what was read, removed and kept."""
    log.info("read %s", counts(report["read"]))
    for outcome in ("left_out", "removed"):
        if report[outcome]:
            log.info("%s %s", outcome.replace("_", " "), counts(report[outcome]))
    for part, size in report["parts"].items():
        log.info("%s: %s", part, counts(size))
    for parts, senses in report["in_both"].items():
        for sense, found in senses.items():
            if any(found.values()):
                log.info("%s (%s): %s", parts, sense, counts(found))


# ---- The steps, each with all that decides its outcome.


def _text_ingredients(corpus: Corpus, options: Options, inputs: Inputs) -> dict[str, object]:
    return {
        "code": code_fingerprint(),
        "inputs": inputs,
        "corpus": repr(corpus),
        "languages": options.languages,
        "seed": options.seed,
    }


def _kept_text(corpus: Corpus, options: Options) -> tuple[Inputs, StepRecord] | None:
    """A finished text, where what it was made of lies neither in a mirror nor in the cache.

    Nothing is fetched again for it. Files that are there may have changed: they are checked.
    """
    if options.mirror is not None or options.cache.exists():
        return None
    try:
        inputs = json.loads((options.out / MANIFEST).read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    text = finished_step(options.out / "text", _text_ingredients(corpus, options, inputs))
    return None if text is None else (inputs, text)


def _text(corpus: Corpus, options: Options) -> tuple[Inputs, StepRecord]:
    files = corpus.origin.obtain(options.languages, options.cache, options.mirror)
    inputs = corpus.origin.inputs(files)
    text = run_step(
        options.out / "text",
        _text_ingredients(corpus, options, inputs),
        lambda folder: make_text(
            folder, corpus, options.languages, files, options.seed, options.workers
        ),
    )
    return inputs, text


def _tokens(corpus: Corpus, options: Options, text: StepRecord) -> StepRecord:
    ingredients = {
        "code": code_fingerprint(),
        "text": text.files,
        "moses": asdict(corpus.moses),
        "sacremoses": importlib.metadata.version("sacremoses"),
    }
    return run_step(
        options.out / "tokens",
        ingredients,
        lambda folder: make_tokens(
            folder,
            options.out / "text",
            options.languages,
            _parts(text),
            corpus.moses,
            options.workers,
        ),
    )


def _parts(text: StepRecord) -> tuple[str, ...]:
    return tuple(text.report["parts"])


def _subwords(options: Options, text: StepRecord, tokens: StepRecord | None) -> StepRecord:
    """Cut what the step before made, text or tokens of Moses, into pieces."""
    folder, tool, make = (
        ("tokens", "subword-nmt", make_bpe_subwords)
        if tokens
        else ("text", "sentencepiece", make_sentencepiece_subwords)
    )
    ingredients = {
        "code": code_fingerprint(),
        "source": (tokens or text).files,
        "vocab_size": options.vocab_size,
        tool: importlib.metadata.version(tool),
    }
    return run_step(
        options.out / "subwords",
        ingredients,
        lambda partial: make(
            partial,
            options.out / folder,
            options.languages,
            _parts(text),
            options.vocab_size,
            options.workers,
        ),
    )


def _binary(corpus: Corpus, options: Options, text: StepRecord, subwords: StepRecord) -> StepRecord:
    pieces = options.out / "subwords"
    dictionary = pieces / DICTIONARY if DICTIONARY in subwords.files else None
    joined = dictionary is not None or corpus.joined_dictionary
    direction = (options.source, options.target)
    ingredients = {
        "code": code_fingerprint(),
        "subwords": subwords.files,
        "direction": direction,
        "joined": joined,
        "fairseq": fairseq_version(),
    }
    return run_step(
        options.out / "data-bin",
        ingredients,
        lambda folder: make_binary(
            folder, pieces, direction, _parts(text), dictionary, joined, options.workers
        ),
    )


# ---- The manifest.


def _manifest(corpus: Corpus, options: Options, inputs: Inputs, steps: Steps) -> dict[str, Any]:
    """What makes a prepared corpus citable, and tells recipes how to undo its tokenisation."""
    text = steps.text.report
    moses = {"moses": asdict(corpus.moses)} if steps.tokens else {}
    return {
        "corpus": corpus.name,
        "command": options.command,
        "direction": [options.source, options.target],
        "terms": [asdict(terms) for terms in corpus.origin.terms()],
        "inputs": inputs,
        "seed": options.seed,
        "normalisation": corpus.cleaning.normalisation,
        "filters": [{"name": step.name, **asdict(step)} for step in corpus.cleaning.filters],
        "left_out": text["left_out"],
        "pairs_read": text["read"],
        "pairs_removed": text["removed"],
        "pairs_kept": text["kept"],
        "parts": text["parts"],
        "held_out_sentences_found_elsewhere": text["in_both"],
        "tokenisation": {
            "name": options.tokenisation,
            **moses,
            "vocab_size": options.vocab_size,
            **steps.subwords.report,
            **steps.binary.report,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _tools(steps)},
            "fairseq": fairseq_version(),
        },
        "outputs": steps.outputs(),
    }


def _tools(steps: Steps) -> tuple[str, ...]:
    return ("sacremoses", "subword-nmt") if steps.tokens else ("sentencepiece",)
