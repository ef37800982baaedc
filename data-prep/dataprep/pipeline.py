"""Prepares one corpus from beginning to end: files, text, subwords, binary data, manifest."""

import logging
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dataprep import DataPrepError
from dataprep.binary_step import make_binary
from dataprep.checksums import file_digest
from dataprep.corpora import MOSES_BPE, Corpus
from dataprep.steps import StepRecord, run_step, write_json
from dataprep.subwords_step import (
    DICTIONARY,
    make_bpe_subwords,
    make_sentencepiece_subwords,
    make_tokens,
)
from dataprep.text_step import counts, make_text
from fairseq_gradinit.versions import fairseq_version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What the user decides, see `prepare.py --help`.

    Attributes:
        languages: those of the corpus, in its order.
        direction: the language to translate from, and the one to translate into.
        command: what the user typed, for the manifest.
    """

    out: Path
    languages: tuple[str, str]
    direction: tuple[str, str]
    seed: int
    tokenisation: str
    vocab_size: int
    mirror: str | None
    cache: Path
    workers: int
    command: str


def prepare(corpus: Corpus, options: Options) -> Path:
    """Make `options.out`, doing only what is not done yet; returns the path of the manifest.

    Raises:
        DataPrepError: anything that the user can fix.
    """
    out, workers = options.out, options.workers
    steps = {}
    steps["text"] = text = run_step(
        out / "text",
        {"corpus": repr(corpus), "languages": options.languages, "seed": options.seed},
        lambda folder: _text(corpus, options, folder),
    )
    _log_text(text.report)
    parts = tuple(text.report["parts"])
    names = [f"{part}.{language}" for part in parts for language in options.languages]

    if options.tokenisation == MOSES_BPE:
        source, tools, make = "tokens", ["sacremoses", "subword-nmt"], make_bpe_subwords
        steps["tokens"] = run_step(
            out / "tokens",
            {
                "text": text.files,
                "moses": asdict(corpus.moses),
                "sacremoses": version("sacremoses"),
            },
            lambda folder: make_tokens(out / "text", names, corpus.moses, workers, folder),
        )
    else:
        source, tools, make = "text", ["sentencepiece"], make_sentencepiece_subwords
    versions = {tool: version(tool) for tool in tools}
    steps["subwords"] = subwords = run_step(
        out / "subwords",
        {"source": steps[source].files, "vocab_size": options.vocab_size, "tools": versions},
        lambda folder: make(out / source, names, options.vocab_size, workers, folder),
    )

    dictionary = out / "subwords" / DICTIONARY if DICTIONARY in subwords.files else None
    joined = dictionary is not None or corpus.joined_dictionary
    versions["fairseq"] = fairseq_version()
    steps["data-bin"] = run_step(
        out / "data-bin",
        {
            "subwords": subwords.files,
            "direction": options.direction,
            "joined": joined,
            "fairseq": versions["fairseq"],
        },
        lambda folder: make_binary(
            folder, out / "subwords", options.direction, parts, dictionary, joined, workers
        ),
    )
    manifest = out / "manifest.json"
    write_json(manifest, _manifest(corpus, options, steps, versions))
    return manifest


def _text(corpus: Corpus, options: Options, folder: Path) -> dict[str, Any]:
    if corpus.disk_bytes:
        require_space(options.out, corpus.disk_bytes)
    files = [
        origin.obtain(options.languages, options.cache, options.mirror) for origin in corpus.origins
    ]
    inputs = [
        {"file": path.name, "sha256": file_digest(path)}
        for obtained in files
        for path in obtained.values()
    ]
    report = make_text(folder, corpus, options.languages, files, options.seed, options.workers)
    return {"inputs": inputs, **report}


def require_space(out: Path, needed: int) -> None:
    """Raise if everything takes more bytes than the disk has, with what an earlier run left."""
    there = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    free = shutil.disk_usage(out).free
    if free + there < needed:
        raise DataPrepError(
            f"This takes some {needed / 1e9:.1f} GB of disk space, and {out} has {free / 1e9:.1f} "
            "GB free. Make room, or choose another --out."
        )


def _log_text(report: Mapping[str, Any]) -> None:
    """Tell what was read, removed and kept."""
    log.info("read %s", counts(report["read"]))
    for outcome in ("left_out", "removed"):
        if report[outcome]:
            log.info("%s %s", outcome.replace("_", " "), counts(report[outcome]))
    for part, size in report["parts"].items():
        log.info("%s: %s", part, counts(size))


def _manifest(
    corpus: Corpus,
    options: Options,
    steps: Mapping[str, StepRecord],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """What makes a prepared corpus citable, and tells recipes how to undo its tokenisation."""
    text = steps["text"].report
    return {
        "corpus": corpus.name,
        "command": options.command,
        "direction": options.direction,
        "terms": [asdict(origin.terms) for origin in corpus.origins],
        "inputs": text["inputs"],
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
            **({"moses": asdict(corpus.moses)} if "tokens" in steps else {}),
            "vocab_size": options.vocab_size,
            "dictionaries": steps["data-bin"].report,
        },
        "versions": {"python": platform.python_version(), **versions},
        "outputs": {
            f"{folder}/{name}": sha
            for folder, record in steps.items()
            for name, sha in record.files.items()
        },
    }
