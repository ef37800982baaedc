"""Prepares one corpus from beginning to end: files, text, subwords, binary data, manifest."""

import importlib.metadata
import logging
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from dataprep import DataPrepError
from dataprep.cleaning import NORMALISATIONS, clean
from dataprep.corpora import Corpus, Published
from dataprep.downloads import obtain_files
from dataprep.readers import Pair, read_wheel, split_lines
from dataprep.splitting import Splits, leakage, overlap, split_pairs
from dataprep.steps import StepRecord, code_fingerprint, run_step, write_json
from dataprep.subwords import encode_lines, train_model, write_dictionary
from dataprep.wheels import obtain_wheels

log = logging.getLogger(__name__)

PARTS = ("train", "valid", "test")
MODEL = "joint.model"
DICTIONARY = "dict.txt"


@dataclass(frozen=True)
class Options:
    """What the user decides.

    Attributes:
        out: the folder that everything is made in.
        source: the language to translate from.
        target: the language to translate into.
        seed: chooses the held-out pairs.
        vocab_size: pieces in the joint vocabulary.
        wheels: a folder that already holds the wheels, or None to fetch them.
        mirror: a folder or an address that stands in for where the files are published, or None.
        cache: the folder that what is fetched is kept in.
        command: what the user typed, for the manifest.
    """

    out: Path
    source: str
    target: str
    seed: int
    vocab_size: int
    wheels: Path | None
    mirror: str | None
    cache: Path
    command: str


def prepare(corpus: Corpus, options: Options) -> Path:
    """Make a folder from which fairseq can train, doing only what is not done yet.

    Under `options.out` there will be text/ (detokenised parts, for sacrebleu), subwords/ (the
    sentencepiece model, the dictionary, the parts cut into pieces), data-bin/ (for fairseq) and
    manifest.json.

    Returns:
        The path of the manifest.

    Raises:
        DataPrepError: anything that the user can mend.
    """
    if {options.source, options.target} != set(corpus.languages):
        raise DataPrepError(
            f"The corpus {corpus.name} has the languages {' and '.join(corpus.languages)}: "
            f"--source-lang {options.source} --target-lang {options.target} is not a direction of "
            "it."
        )
    if corpus.published is None:
        paths = obtain_wheels(corpus.wheels, options.cache, options.wheels)
    else:
        paths = obtain_files(corpus.published.files, options.cache, options.mirror)
    text = make_text(corpus, options, paths)
    subwords = make_subwords(corpus, options, text)
    binary = make_binary(options, subwords)
    manifest = options.out / "manifest.json"
    write_json(manifest, _manifest(corpus, options, text, subwords, binary))
    return manifest


def make_text(corpus: Corpus, options: Options, paths: Mapping[str, Path]) -> StepRecord:
    """Write text/{train,valid,test}.{language}, one sentence a line.

    Args:
        corpus: which corpus.
        options: the seed and the output folder are used.
        paths: the verified files, wheels by their project and others by their name.

    Raises:
        DataPrepError: a file does not hold what it should, or too few pairs are left.
    """

    def work(folder: Path) -> dict:
        if corpus.published is None:
            splits, report = _held_out(corpus, options.seed, paths)
        else:
            splits, report = _as_published(corpus.published, corpus.languages, paths)
        for part, pairs in splits.parts().items():
            columns = zip(*((pair.first, pair.second) for pair in pairs), strict=True)
            for language, lines in zip(corpus.languages, columns, strict=True):
                _write_lines(folder / f"{part}.{language}", lines)
        sizes = {part: _size(pairs, corpus) for part, pairs in splits.parts().items()}
        return {**report, "parts": sizes}

    ingredients = {
        "code": code_fingerprint(),
        "wheels": [wheel.sha256 for wheel in corpus.wheels],
        "corpus": repr(corpus),
        "seed": options.seed,
    }
    record = run_step(options.out / "text", ingredients, work)
    _log_text(record.report)
    return record


def _held_out(corpus: Corpus, seed: int, paths: Mapping[str, Path]) -> tuple[Splits, dict]:
    """Align what the wheels hold, clean it and hold pairs out; say what was read and removed."""
    aligned: list[Pair] = []
    read: dict[str, int] = {}
    for wheel in tqdm(corpus.wheels, desc="reading wheels", unit="wheel", disable=None):
        pairs = read_wheel(paths[wheel.project], wheel.reader, corpus.languages)
        read[wheel.project] = len(pairs)
        aligned += pairs
    cleaned = clean(tqdm(aligned, desc="cleaning", unit="pair", disable=None), corpus.rules)
    splits = split_pairs(cleaned.pairs, corpus.valid_pairs, corpus.test_pairs, seed=seed)
    leaks = leakage(splits)
    if any(leaks.values()):  # cannot happen by the way the split is made; never to be shipped
        raise AssertionError(f"held-out sentences occur in training: {leaks}")
    return splits, {"read": read, "removed": cleaned.removed, "leakage": leaks}


def _as_published(
    published: Published, languages: tuple[str, str], paths: Mapping[str, Path]
) -> tuple[Splits, dict]:
    """Read the parts whole and in order; say what was read and what of it was trained on.

    Raises:
        DataPrepError: a part has more or fewer pairs than it should.
    """
    normalise = NORMALISATIONS[published.normalisation]
    parts = {
        part: [Pair(normalise(pair.first), normalise(pair.second)) for pair in pairs]
        for part, pairs in published.reader.read(paths, languages).items()
    }
    read = {part: len(pairs) for part, pairs in parts.items()}
    if read != published.pairs:
        raise DataPrepError(
            f"The published files have other numbers of pairs than they should: expected "
            f"{_counts(published.pairs)}, found {_counts(read)}."
        )
    splits = Splits(**parts)
    found = overlap(splits, languages)
    return splits, {"read": read, "leakage": leakage(splits), "overlap": found}


def make_subwords(corpus: Corpus, options: Options, text: StepRecord) -> StepRecord:
    """Learn the joint vocabulary on the training text and cut all parts into pieces.

    Raises:
        DataPrepError: the text is too small for the vocabulary.
    """
    source = options.out / "text"

    def work(folder: Path) -> dict:
        training = [_read_lines(source / f"train.{language}") for language in corpus.languages]
        log.info("learning a joint vocabulary of %d pieces", options.vocab_size)
        sentences = (line for side in training for line in side)
        train_model(sentences, options.vocab_size, folder / MODEL)
        pieces = write_dictionary(folder / MODEL, folder / DICTIONARY)
        tokens = {}
        for part in PARTS:
            for language in corpus.languages:
                lines = encode_lines(folder / MODEL, _read_lines(source / f"{part}.{language}"))
                _write_lines(folder / f"{part}.{language}", lines)
                tokens[f"{part}.{language}"] = sum(line.count(" ") + 1 for line in lines)
        return {"pieces": pieces, "tokens": tokens}

    ingredients = {
        "code": code_fingerprint(),
        "text": text.files,
        "vocab_size": options.vocab_size,
        "sentencepiece": importlib.metadata.version("sentencepiece"),
    }
    return run_step(options.out / "subwords", ingredients, work)


def make_binary(options: Options, subwords: StepRecord) -> StepRecord:
    """Have fairseq-preprocess write data-bin/ with one dictionary for both languages.

    Raises:
        DataPrepError: fairseq is not installed, or its preprocessing failed.
    """
    pieces = options.out / "subwords"

    def work(folder: Path) -> dict:
        command = [sys.executable, "-m", "fairseq_cli.preprocess", "--joined-dictionary"]
        command += ["--source-lang", options.source, "--target-lang", options.target]
        command += ["--srcdict", str(pieces / DICTIONARY), "--destdir", str(folder)]
        for part in PARTS:
            command += [f"--{part}pref", str(pieces / part)]
        result = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if result.returncode != 0:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataPrepError(
                f"fairseq-preprocess failed: {last[:300]} Check that fairseq is installed for "
                f"{sys.executable}."
            )
        # It holds times and paths, by which two runs would differ.
        (folder / "preprocess.log").unlink(missing_ok=True)
        return {"source": options.source, "target": options.target}

    ingredients = {
        "code": code_fingerprint(),
        "subwords": subwords.files,
        "direction": [options.source, options.target],
        "fairseq": _fairseq_version(),
    }
    return run_step(options.out / "data-bin", ingredients, work)


def _fairseq_version() -> str:
    """The installed fairseq, whichever distribution brought it."""
    distributions = importlib.metadata.packages_distributions().get("fairseq")
    if not distributions:
        raise DataPrepError(
            f"fairseq is not installed for {sys.executable}. Install it as the README says, then "
            "run the same command again: what is done so far is kept."
        )
    return f"{distributions[0]} {importlib.metadata.version(distributions[0])}"


def _manifest(
    corpus: Corpus, options: Options, text: StepRecord, subwords: StepRecord, binary: StepRecord
) -> dict:
    return {
        "corpus": corpus.name,
        "command": options.command,
        "direction": [options.source, options.target],
        **_text_manifest(corpus, options, text.report),
        "vocabulary": {"size": options.vocab_size, **subwords.report},
        "versions": {
            "python": platform.python_version(),
            "sentencepiece": importlib.metadata.version("sentencepiece"),
            "fairseq": _fairseq_version(),
        },
        "outputs": {
            f"{folder}/{name}": sha
            for folder, record in (("text", text), ("subwords", subwords), ("data-bin", binary))
            for name, sha in record.files.items()
        },
    }


def _text_manifest(corpus: Corpus, options: Options, report: dict) -> dict:
    """Where the text came from and what became of it."""
    outcome = {
        "parts": report["parts"],
        "held_out_pairs_found_elsewhere": report["leakage"],
    }
    published = corpus.published
    if published is not None:
        return {
            "licence": published.licence,
            "licence_evidence": published.licence_evidence,
            "citation": published.citation,
            "inputs": [
                {"file": file.filename, "address": file.address, "sha256": file.sha256}
                for file in published.files
            ],
            "normalisation": published.normalisation,
            **outcome,
            "held_out_sentences_found_in_training": report["overlap"],
        }
    return {
        "seed": options.seed,
        "inputs": [
            {
                "project": wheel.project,
                "version": wheel.version,
                "file": wheel.filename,
                "sha256": wheel.sha256,
                "licence": wheel.licence,
                "licence_evidence": wheel.licence_evidence,
                "citation": wheel.citation,
                "pairs_read": report["read"][wheel.project],
            }
            for wheel in corpus.wheels
        ],
        "rules": asdict(corpus.rules),
        "pairs_removed": report["removed"],
        **outcome,
    }


def _log_text(report: dict) -> None:
    log.info("read %s", _counts(report["read"]))
    if "removed" in report:
        log.info("removed %s", _counts(report["removed"]))
    for part, size in report["parts"].items():
        log.info("%s: %s", part, _counts(size))


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items())


def _size(pairs: list[Pair], corpus: Corpus) -> dict[str, int]:
    first, second = corpus.languages
    return {
        "pairs": len(pairs),
        f"words_{first}": sum(len(pair.first.split()) for pair in pairs),
        f"words_{second}": sum(len(pair.second.split()) for pair in pairs),
    }


def _read_lines(path: Path) -> list[str]:
    return split_lines(path.read_text(encoding="utf-8"))


def _write_lines(path: Path, lines) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
