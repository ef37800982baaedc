"""Fetching, resuming and the whole preparation, on miniature wheels and without a network."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import prepare
import pytest
import sacrebleu
from dataprep import (
    DataPrepError,
    binary_step,
    origins,
    pipeline,
    sentencepiece_model,
    steps,
    text_step,
    wheels,
)
from dataprep.catalogues import JsonCatalogues
from dataprep.checksums import file_sha256
from dataprep.corpora import CORPORA, QUICKSTART, Corpus
from dataprep.origins import Domains, Wheels
from dataprep.splitting import HeldOut
from dataprep.steps import run_step
from dataprep.wheels import Wheel, obtain_wheels

NUMBERS = {
    "one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "f\u00fcnf",
    "six": "sechs", "seven": "sieben", "eight": "acht", "nine": "neun", "ten": "zehn",
}  # fmt: skip
DIGITS = {"null": "zero"} | {german: english for english, german in NUMBERS.items()}
THINGS = {
    "lamp": "Lampe", "door": "T\u00fcr", "window": "Fenster", "key": "Schl\u00fcssel",
    "sensor": "Sensor", "camera": "Kamera", "switch": "Schalter", "clock": "Uhr",
}  # fmt: skip


def catalogue_wheel(folder, name="mini-1.0-py3-none-any.whl", on=("on", "ein")):
    """A wheel of 640 messages, and its pin."""
    folder.mkdir(parents=True, exist_ok=True)
    english, german = {}, {}
    for number, nummer in NUMBERS.items():
        for thing, ding in THINGS.items():
            for other, anderes in THINGS.items():
                key = f"{number}_{thing}_{other}"
                english[key] = f"Turn {on[0]} the {thing} {number} next to the {other}."
                german[key] = f"{ding} {nummer} neben {anderes} {on[1]}schalten."
    with zipfile.ZipFile(folder / name, "w") as archive:
        for language, messages in (("en", english), ("de", german)):
            entry = zipfile.ZipInfo(f"mini/a/{language}.json", (2020, 1, 1, 0, 0, 0))
            archive.writestr(entry, json.dumps(messages))
    return Wheel(
        project="mini",
        version="1.0",
        filename=name,
        sha256=file_sha256(folder / name),
        licence="CC0-1.0",
        licence_evidence="made here",
        citation="these tests",
        reader=JsonCatalogues("mini/*/{language}.json"),
    )


@pytest.fixture
def corpus(tmp_path):
    return Corpus(
        name="mini",
        summary="numbered things",
        languages=("en", "de"),
        default_source="de",
        origin=Wheels((catalogue_wheel(tmp_path / "wheels"),)),
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

    def run(command, **_):
        import fairseq_cli.preprocess

        with mock.patch.object(sys, "argv", ["fairseq-preprocess", *command[3:]]):
            fairseq_cli.preprocess.cli_main()
        fairseq_cli.preprocess.logger.handlers.clear()  # its log is a file of this corpus
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(binary_step.subprocess, "run", run)


@pytest.fixture
def instant_fairseq(monkeypatch):
    """Replaces fairseq-preprocess, which takes seconds, where its work is not what is tested."""
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--destdir") + 1])
        (folder / "dict.de.txt").write_text("x 1\n", encoding="utf-8")
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(binary_step.subprocess, "run", run)
    return calls


def contents(folder):
    """All files under a folder except the manifest, whose command line names the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def skipped(caplog):
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return [line.split()[1].rstrip(":") for line in lines if "skipped" in line]


def test_two_runs_agree_byte_for_byte_and_fairseq_reads_the_result(command, fairseq_here, tmp_path):
    assert command(out="first") == 0
    assert command(out="second") == 0
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first == second
    assert {"subwords/joint.model", "data-bin/train.de-en.de.bin", "text/test.en"} <= set(first)

    manifest = json.loads((tmp_path / "first/manifest.json").read_text(encoding="utf-8"))
    other = json.loads((tmp_path / "second/manifest.json").read_text(encoding="utf-8"))
    assert manifest | {"command": ""} == other | {"command": ""}
    assert manifest["direction"] == ["de", "en"]
    assert manifest["terms"][0]["licence"] == "CC0-1.0"
    assert manifest["inputs"][0]["sha256"] == file_sha256(next((tmp_path / "wheels").iterdir()))
    read = sum(manifest["pairs_read"].values())
    parts = sum(part["pairs"] for part in manifest["parts"].values())
    assert read == 640 == parts + sum(manifest["pairs_removed"].values())
    for senses in manifest["held_out_sentences_found_elsewhere"].values():
        assert not any(number for found in senses.values() for number in found.values())
    for name, sha in manifest["outputs"].items():
        assert file_sha256(tmp_path / "first" / name) == sha

    folder = tmp_path / "first"
    dictionaries = [folder / f"data-bin/dict.{language}.txt" for language in ("de", "en")]
    assert dictionaries[0].read_bytes() == dictionaries[1].read_bytes()
    assert len(dictionaries[0].read_text(encoding="utf-8").splitlines()) == 117
    from fairseq.data import Dictionary, data_utils

    dictionary = Dictionary.load(str(dictionaries[0]))
    dataset = data_utils.load_indexed_dataset(
        str(folder / "data-bin/test.de-en.en"), dictionary, "mmap"
    )
    text = [dictionary.string(sentence, "sentencepiece") for sentence in dataset]
    reference = (folder / "text/test.en").read_text(encoding="utf-8").splitlines()
    assert text == reference
    assert sacrebleu.corpus_bleu(text, [reference]).score == pytest.approx(100)


def test_each_domain_has_a_test_set(command, corpus, fairseq_here, tmp_path, monkeypatch):
    wheel = catalogue_wheel(tmp_path / "wheels", "off-1.0-py3-none-any.whl", ("off", "aus"))
    other = replace(wheel, project="off")
    domains = Domains((("on", corpus.origin), ("off", Wheels((other,)))))
    monkeypatch.setitem(CORPORA, "mini", replace(corpus, origin=domains))
    assert command("--tokenisation", "moses+bpe") == 0

    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert [described["domain"] for described in manifest["inputs"]] == ["on", "off"]
    sizes = {part: size["pairs"] for part, size in manifest["parts"].items()}
    kept = sum(manifest["pairs_kept"].values())
    assert set(manifest["pairs_kept"]) == {"mini", "off"}
    train = kept - 2 * (8 + 16)
    assert sizes == {"train": train, "valid": 16, "test": 32, "test-on": 16, "test-off": 16}
    sets = [(out / f"text/test{name}.en").read_text() for name in ("", "-on", "-off")]
    assert sets[0] == sets[1] + sets[2]
    assert all("Turn off" in line for line in sets[2].splitlines())
    # In pieces and in fairseq's data, a test set has the name that it has as text.
    for suffix in ("de.bin", "de.idx", "en.bin", "en.idx"):
        binaries = {p.name for p in (out / "data-bin").glob(f"*.{suffix}")}
        assert binaries == {f"{part}.de-en.{suffix}" for part in sizes}
    from fairseq.data import data_utils

    dataset = data_utils.load_indexed_dataset(str(out / "data-bin/test-off.de-en.en"), None, "mmap")
    pieces = (out / "subwords/test-off.en").read_text(encoding="utf-8").splitlines()
    assert [len(sentence) - 1 for sentence in dataset] == [len(line.split()) for line in pieces]


def test_finished_steps_are_skipped_and_changed_ones_redone(
    command, instant_fairseq, tmp_path, caplog
):
    caplog.set_level("INFO")
    assert command() == 0
    assert skipped(caplog) == []
    before = contents(tmp_path / "out")
    assert command() == 0
    assert skipped(caplog) == ["text", "subwords", "data-bin"]
    assert contents(tmp_path / "out") == before
    assert len(instant_fairseq) == 1

    assert command("--source-lang", "en") == 0
    assert skipped(caplog) == ["text", "subwords"]
    assert "--source-lang en --target-lang de" in " ".join(instant_fairseq[-1])
    assert command("--vocab-size", "130") == 0
    assert skipped(caplog) == ["text"]
    assert command("--seed", "2") == 0
    assert skipped(caplog) == []
    assert command() == 0
    assert contents(tmp_path / "out") == before

    (tmp_path / "out/text/train.de").write_text("tampered\n", encoding="utf-8")
    (tmp_path / "out/data-bin/dict.de.txt").unlink()
    skipped(caplog)
    assert command() == 0
    assert skipped(caplog) == ["subwords"]
    assert contents(tmp_path / "out") == before


def test_nothing_is_fetched_for_a_finished_text(
    command, instant_fairseq, tmp_path, caplog, capsys, monkeypatch
):
    def no_network(*_):
        raise DataPrepError("the network was asked")

    assert command() == 0
    monkeypatch.setattr(origins, "obtain_wheels", no_network)
    alone = ["mini", "--out", str(tmp_path / "out"), "--workers", "1"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))

    caplog.set_level("INFO")
    assert prepare.main(alone) == 0
    assert skipped(caplog) == ["text", "subwords", "data-bin"]
    again = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    assert again | {"command": ""} == manifest | {"command": ""}
    assert prepare.main([*alone, "--vocab-size", "130"]) == 0
    assert skipped(caplog) == ["text"]

    capsys.readouterr()
    for changed in (["--seed", "2"], ["--mirror", str(tmp_path / "wheels")]):
        assert prepare.main([*alone, *changed]) == 1
        assert "the network was asked" in capsys.readouterr().err
    (tmp_path / "out/text/train.de").write_text("tampered\n", encoding="utf-8")
    assert prepare.main(alone) == 1
    assert "the network was asked" in capsys.readouterr().err


BREAKING = {
    "clean": (text_step, []),
    "train_model": (sentencepiece_model, ["text"]),
    "write_dictionary": (sentencepiece_model, ["text"]),
    "write_json": (pipeline, ["text", "subwords", "data-bin"]),
}


@pytest.mark.parametrize("broken", BREAKING)
def test_a_killed_run_is_resumed(
    command, instant_fairseq, tmp_path, monkeypatch, caplog, broken, capsys
):
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


def test_a_step_killed_before_its_last_move_leaves_no_folder(tmp_path, monkeypatch):
    def work(folder):
        (folder / "a.txt").write_text("half", encoding="utf-8")
        return {}

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            run_step(tmp_path / "step", {}, work)
    assert [entry.name for entry in tmp_path.iterdir()] == [f".partial-step-{os.getpid()}"]
    run_step(tmp_path / "step", {}, work)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step"]


def test_a_folder_of_the_user_is_not_replaced(command, instant_fairseq, tmp_path, capsys):
    (tmp_path / "out/text").mkdir(parents=True)
    (tmp_path / "out/text/thesis.txt").write_text("dear", encoding="utf-8")
    assert command() == 1
    assert "was not made by this program" in capsys.readouterr().err
    assert (tmp_path / "out/text/thesis.txt").read_text(encoding="utf-8") == "dear"


def error_of(command, capsys, *arguments):
    assert command(*arguments) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    lines = [line for line in message.splitlines() if line.startswith("prepare.py: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_corrupt_truncated_and_missing_wheels(command, instant_fairseq, corpus, tmp_path, capsys):
    assert command() == 0  # every use checks them
    capsys.readouterr()
    path = tmp_path / "wheels" / corpus.origin.wheels[0].filename
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50] + b"?" + whole[51:], b""):
        path.write_bytes(damaged)
        message = error_of(command, capsys)
        assert str(path) in message
        assert (
            f"expected SHA-256 {corpus.origin.wheels[0].sha256}, found {file_sha256(path)}"
            in message
        )
        assert f"({len(damaged):,} bytes)" in message
        assert "or leave --mirror out to fetch it" in message
    path.unlink()
    assert f"{path} cannot be read (No such file" in error_of(command, capsys)


def test_mistakes_on_the_command_line(command, capsys):
    assert "is not a direction of it" in error_of(command, capsys, "--source-lang", "fr")
    assert "is not a direction" in error_of(
        command, capsys, "--source-lang", "de", "--target-lang", "de"
    )
    assert "choose another --vocab-size" in error_of(command, capsys, "--vocab-size", "100000")
    assert "choose another --vocab-size" in error_of(command, capsys, "--vocab-size", "0")


def test_list_names_licences(capsys):
    with pytest.raises(SystemExit) as leaving:
        prepare.main(["--list"])
    assert leaving.value.code == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: " in listed for name in CORPORA)
    assert "\n    Apache-2.0\n" in listed


def test_fairseq_failing_or_missing(command, tmp_path, monkeypatch, capsys):
    def fail(command, **_):
        return subprocess.CompletedProcess(
            command, 1, stderr="warning\nValueError: no dictionary\n"
        )

    with monkeypatch.context() as patch:
        patch.setattr(binary_step.subprocess, "run", fail)
        assert "fairseq-preprocess failed: ValueError: no dictionary" in error_of(command, capsys)
    monkeypatch.setattr(binary_step.importlib.metadata, "packages_distributions", dict)
    assert "fairseq is not installed" in error_of(command, capsys)
    assert not (tmp_path / "out/data-bin").exists()


def fake_pip(source, status=0, message=""):
    """Stands in for pip: copies from a folder what the requirements ask for."""

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(command)
        destination = command[command.index("--dest") + 1]
        requirements = Path(command[command.index("-r") + 1]).read_text(encoding="utf-8")
        assert requirements.startswith("mini==1.0 --hash=sha256:")
        for path in source.iterdir():
            shutil.copy(path, destination)
        return subprocess.CompletedProcess(command, status, stderr=message)

    return run


def test_wheels_are_fetched_once_and_kept(corpus, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    (cache / ".partial-of-a-killed-run").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(wheels.subprocess, "run", fake_pip(tmp_path / "wheels"))
        paths = obtain_wheels(corpus.origin.wheels, cache)
    assert [entry.name for entry in cache.iterdir()] == [corpus.origin.wheels[0].filename]
    assert paths == {"mini": cache / corpus.origin.wheels[0].filename}
    monkeypatch.setattr(wheels.subprocess, "run", None)  # would fail if called
    assert obtain_wheels(corpus.origin.wheels, cache) == paths
    paths["mini"].write_bytes(b"rotten")
    with pytest.raises(DataPrepError, match="Delete it and run the same command again"):
        obtain_wheels(corpus.origin.wheels, cache)


def test_a_failing_pip_is_told_in_a_sentence(corpus, tmp_path, monkeypatch):
    failing = fake_pip(tmp_path / "wheels", 1, "noise\nERROR: no such version\n")
    monkeypatch.setattr(wheels.subprocess, "run", failing)
    with pytest.raises(DataPrepError, match=r"could not fetch mini 1\.0: ERROR: no such version"):
        obtain_wheels(corpus.origin.wheels, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_real_pip_checks_the_hash_of_a_local_index(tmp_path, monkeypatch):
    """The options that we give pip do what we want of them; the index is a folder."""
    source = tmp_path / "index"
    wheel = catalogue_wheel(source)
    with zipfile.ZipFile(source / wheel.filename, "a") as archive:
        archive.writestr(
            "mini-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: mini\n"
            "Version: 1.0\nRequires-Python: >=99\nRequires-Dist: absent\n",
        )
        archive.writestr("mini-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("mini-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    with pytest.raises(DataPrepError, match=r"pip could not fetch mini 1\.0"):
        obtain_wheels([wheel], tmp_path / "cache")  # its hash changed above
    wheel = replace(wheel, sha256=file_sha256(source / wheel.filename))
    assert obtain_wheels([wheel], tmp_path / "cache")["mini"].exists()


@pytest.mark.usefixtures("fairseq_here")
@pytest.mark.parametrize("tokenisation", ["moses+bpe", "sentencepiece"])
def test_reversed_digits(tmp_path, tokenisation, capsys):
    out = tmp_path / "out"
    options = ["numbers", "--out", str(out), "--workers", "1", "--tokenisation", tokenisation]
    assert prepare.main(options) == 0
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["direction"] == ["de", "en"]
    assert manifest["inputs"] == []
    sentences = []
    for part, pairs in {"train": 2_000, "valid": 50, "test": 50}.items():
        german, english = (
            (out / f"text/{part}.{language}").read_text(encoding="utf-8").splitlines()
            for language in ("de", "en")
        )
        assert len(german) == len(english) == pairs
        for digits, backwards in zip(german, english, strict=True):
            assert [DIGITS[digit] for digit in digits.split()] == backwards.split()[::-1]
        sentences += german
        assert (out / f"data-bin/{part}.de-en.de.idx").exists()
    assert len(set(sentences)) == 2_100
    pieces = (out / "subwords/test.de").read_text(encoding="utf-8").splitlines()
    joined = [
        line.replace("@@ ", "")
        if tokenisation == "moses+bpe"
        else line.replace(" ", "").replace("\u2581", " ").strip()
        for line in pieces
    ]
    assert joined == (out / "text/test.de").read_text(encoding="utf-8").splitlines()
    assert joined != pieces
    assert prepare.main([*options, "--mirror", "folder"]) == 1
    assert "--mirror does not apply to this corpus" in capsys.readouterr().err


@pytest.mark.slow
def test_prepare_runs_from_any_folder(tmp_path):
    """With processes of its own, which ours do without; the bytes do not depend on them."""
    script = Path(prepare.__file__)
    for workers in ("1", "2"):
        subprocess.run(
            [sys.executable, str(script), "numbers", "--out", workers, "--workers", workers],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": ""},
            check=True,
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert (tmp_path / "1/data-bin/train.de-en.en.bin").stat().st_size > 0
