"""Corpora used as published: fetching from a server on loopback or a folder, and what it finds."""

import gzip
import json
from dataclasses import replace

import prepare
import pytest
from dataprep.checksums import file_sha256
from dataprep.corpora import CORPORA, MULTI30K_DE_EN
from dataprep.downloads import SourceFile
from loopback import serve_folder

# A fixture.
from test_data_prep_pipeline import fairseq_here  # noqa: F401

LAYOUT = "/data/task1/raw"  # the published one
PAIRS = {"train": 120, "valid": 7, "test": 5}
NAMES = [file.filename for file in MULTI30K_DE_EN.origin.files]


def sentences(part, language):
    """Numbered descriptions; the first two of training again in the other parts, changed."""
    kinds = {"de": "Ein M\u00e4dchen mit %d roten B\u00e4llen.", "en": "A girl with %d red balls."}
    start = {"train": 0, "valid": 1000, "test": 2000}[part]
    lines = [kinds[language] % (start + i) for i in range(PAIRS[part])]
    if part == "valid":
        lines[0] = kinds[language] % 0  # a whole pair of training
        lines[1] = (kinds[language] % 1).lower() if language == "en" else "Etwas anderes."
    if part == "test":
        lines[2] = "  zwei \u00a0 B\u00e4lle\u2028da " if language == "de" else "two balls there"
    return lines


def write_gzip(path, lines):
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


@pytest.fixture
def site(tmp_path):
    """A folder in the published layout; returns the one that holds the six files."""
    folder = tmp_path / "site" / LAYOUT.lstrip("/")
    folder.mkdir(parents=True)
    for name in NAMES:
        stem, language, _ = name.split(".")
        part = {"val": "valid", "test_2016_flickr": "test"}.get(stem, stem)
        write_gzip(folder / name, sentences(part, language))
    return folder


@pytest.fixture
def pin(site, monkeypatch):
    """Enters Multi30k in miniature into the table, with the sums of what the folder holds now."""

    def enter():
        files = tuple(
            SourceFile(
                f"https://nowhere.invalid{LAYOUT}/{name}", f"sha256:{file_sha256(site / name)}"
            )
            for name in NAMES
        )
        origin = replace(MULTI30K_DE_EN.origin, files=files)
        corpus = replace(MULTI30K_DE_EN, name="mini", vocab_size=70, origin=origin, expected=PAIRS)
        monkeypatch.setitem(CORPORA, "mini", corpus)
        return files

    return enter


@pytest.fixture
def server(tmp_path, site):
    with serve_folder(tmp_path / "site") as address:
        yield f"{address}{LAYOUT}"


@pytest.fixture
def command(tmp_path):
    """Runs the command line on the miniature corpus; returns the exit status."""

    def run(*arguments):
        return prepare.main(
            ["mini", "--out", str(tmp_path / "out"), "--workers", "1", *map(str, arguments)]
        )

    return run


def error_of(command, capsys, *arguments):
    capsys.readouterr()
    assert command(*arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("prepare.py: error: ")]
    return line


def messages(caplog):
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


@pytest.mark.usefixtures("fairseq_here")
def test_parts_are_fetched_kept_whole_and_made_binary(command, pin, server, site, tmp_path, caplog):
    pin()
    caplog.set_level("INFO")
    assert command("--mirror", f"{server}/") == 0
    assert sum("fetched from" in line for line in messages(caplog)) == len(NAMES)
    out = tmp_path / "out"
    cache = out / "downloads"
    assert sorted(path.name for path in cache.glob("[!.]*")) == sorted(NAMES)
    for part in PAIRS:
        for language in ("de", "en"):
            text = (out / f"text/{part}.{language}").read_text(encoding="utf-8")
            expected = [" ".join(line.split()) for line in sentences(part, language)]
            assert text.split("\n") == [*expected, ""]
    assert (out / "text/test.de").read_text(encoding="utf-8").split("\n")[2] == "zwei B\u00e4lle da"

    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert {part: size["pairs"] for part, size in manifest["parts"].items()} == PAIRS
    (terms,) = manifest["terms"]
    assert "non-commercial" in terms["licence"]
    assert "Multi30K" in terms["citation"]
    assert manifest["normalisation"] == "single spaces"
    assert manifest["inputs"][2] == {
        "file": "val.de.gz",
        "address": f"https://nowhere.invalid{LAYOUT}/val.de.gz",
        "sha256": file_sha256(site / "val.de.gz"),
    }
    found = manifest["held_out_sentences_found_elsewhere"]
    assert found["valid, in train"]["exact"] == {"de": 1, "en": 1, "pair": 1}
    assert found["valid, in train"]["casefold, no punctuation"] == {"de": 1, "en": 2, "pair": 1}
    assert not any(found["test, in train"]["exact"].values())
    assert found["test, in valid"]["also numbers and placeholders masked"]["en"] > 0
    assert manifest["tokenisation"]["name"] == "sentencepiece"
    assert manifest["tokenisation"]["pieces"] == 67
    for name, sha in manifest["outputs"].items():
        assert file_sha256(out / name) == sha

    from fairseq.data import Dictionary, data_utils

    dictionary = Dictionary.load(str(out / "data-bin/dict.en.txt"))
    data = data_utils.load_indexed_dataset(str(out / "data-bin/valid.de-en.en"), dictionary, "mmap")
    decoded = [dictionary.string(sentence, "sentencepiece") for sentence in data]
    assert decoded == sentences("valid", "en")

    # What was fetched is kept: nothing is asked for again, and nothing is done again.
    messages(caplog)
    assert command("--mirror", server) == 0
    again = messages(caplog)
    assert sum("already here" in line for line in again) == len(NAMES)
    assert [line.split()[1] for line in again if "skipped" in line] == [
        "text:", "subwords:", "data-bin:",
    ]  # fmt: skip
    # A folder holds the same files: they are read there.
    assert command("--mirror", site) == 0
    again = messages(caplog)
    assert sum("skipped" in line for line in again) == 3
    assert not any("already here" in line for line in again)


def test_options_that_do_not_apply_to_the_corpus(command, pin, site, capsys):
    pin()
    for option in (["--seed", "2"], ["--lang", "de"]):
        assert f"{option[0]} does not apply" in error_of(command, capsys, *option)
