"""Corpora used as published: fetching from a server on loopback or a folder, and what it finds."""

import gzip
import http.server
import json
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import prepare
import pytest
from dataprep import DataPrepError, pipeline
from dataprep.corpora import CORPORA, MULTI30K_DE_EN, QUICKSTART, SourceFile
from dataprep.downloads import obtain_files
from dataprep.readers import GzipLines, Pair
from dataprep.splitting import MATCHES, Splits, overlap
from dataprep.wheels import file_sha256

LAYOUT = "/data/task1/raw"  # the published one
PAIRS = {"train": 120, "valid": 7, "test": 5}
NAMES = [file.filename for file in MULTI30K_DE_EN.published.files]


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
            SourceFile(f"https://nowhere.invalid{LAYOUT}/{name}", file_sha256(site / name))
            for name in NAMES
        )
        published = replace(MULTI30K_DE_EN.published, files=files, pairs=PAIRS)
        corpus = replace(MULTI30K_DE_EN, name="mini", vocab_size=70, published=published)
        monkeypatch.setitem(CORPORA, "mini", corpus)
        return files

    return enter


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; counts what is asked for, and breaks off one file when told to."""

    def do_GET(self):
        self.server.asked.append(self.path.rpartition("/")[2])
        if self.server.breaks_off == self.server.asked[-1]:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"only so much")
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, site):
    def handler(*arguments):
        return Handler(*arguments, directory=str(tmp_path / "site"))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.asked, running.breaks_off = [], None
        running.mirror = f"http://127.0.0.1:{running.server_port}{LAYOUT}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def command(tmp_path):
    """Runs the command line on the miniature corpus; returns the exit status."""

    def run(*arguments):
        return prepare.main(["mini", "--out", str(tmp_path / "out"), *map(str, arguments)])

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


def test_parts_are_fetched_kept_whole_and_made_binary(command, pin, server, site, tmp_path, caplog):
    pin()
    caplog.set_level("INFO")
    assert command("--mirror", f"{server.mirror}/") == 0
    assert server.asked == NAMES
    out = tmp_path / "out"
    cache = out / "downloads"
    assert sorted(path.name for path in cache.iterdir()) == sorted(NAMES)
    for part in PAIRS:
        for language in ("de", "en"):
            text = (out / f"text/{part}.{language}").read_text(encoding="utf-8")
            expected = [" ".join(line.split()) for line in sentences(part, language)]
            assert text.split("\n") == [*expected, ""]
    assert (out / "text/test.de").read_text(encoding="utf-8").split("\n")[2] == "zwei B\u00e4lle da"

    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert {part: size["pairs"] for part, size in manifest["parts"].items()} == PAIRS
    assert "non-commercial" in manifest["licence"]
    assert "Multi30K" in manifest["citation"]
    assert manifest["normalisation"] == "single spaces"
    assert manifest["inputs"][2] == {
        "file": "val.de.gz",
        "address": f"https://nowhere.invalid{LAYOUT}/val.de.gz",
        "sha256": file_sha256(site / "val.de.gz"),
    }
    trained = manifest["held_out_sentences_found_in_training"]
    assert trained["valid"]["exact"] == {"de": 1, "en": 1, "pair": 1}
    assert trained["valid"]["casefold, no punctuation"] == {"de": 1, "en": 2, "pair": 1}
    assert not any(trained["test"]["exact"].values())
    assert manifest["held_out_pairs_found_elsewhere"]["casefold, no punctuation"] == 2
    assert manifest["vocabulary"]["pieces"] == 67
    for name, sha in manifest["outputs"].items():
        assert file_sha256(out / name) == sha

    from fairseq.data import Dictionary, data_utils

    dictionary = Dictionary.load(str(out / "data-bin/dict.en.txt"))
    data = data_utils.load_indexed_dataset(str(out / "data-bin/valid.de-en.en"), dictionary, "mmap")
    decoded = [dictionary.string(sentence, "sentencepiece") for sentence in data]
    assert decoded == sentences("valid", "en")

    # What was fetched is kept: nothing is asked for again, and nothing is done again.
    messages(caplog)
    assert command("--mirror", server.mirror) == 0
    assert len(server.asked) == len(NAMES)
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


def test_only_what_changed_is_redone(command, pin, site, tmp_path, monkeypatch, caplog):
    pin()

    def fairseq(command, **_):
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(pipeline.subprocess, "run", fairseq)
    caplog.set_level("INFO")

    def skipped(*arguments):
        messages(caplog)
        assert command("--mirror", site, *arguments) == 0
        return [line.split()[1] for line in messages(caplog) if "skipped" in line]

    assert skipped() == []
    assert skipped("--target-lang", "de") == ["text:", "subwords:"]
    assert skipped("--target-lang", "de", "--vocab-size", "75") == ["text:"]
    (tmp_path / "out/text/valid.en").write_text("tampered\n", encoding="utf-8")
    assert skipped("--target-lang", "de", "--vocab-size", "75") == ["subwords:", "data-bin:"]


@pytest.mark.parametrize("damage", [b"", b"<html>not found</html>", "truncated"])
def test_another_file_than_the_pinned_one(command, pin, server, site, tmp_path, capsys, damage):
    expected = pin()[2].sha256
    path = site / "val.de.gz"
    path.write_bytes(path.read_bytes()[:-5] if damage == "truncated" else damage)
    for mirror, named in ((server.mirror, f"{server.mirror}/val.de.gz"), (site, path)):
        message = error_of(command, capsys, "--mirror", mirror)
        assert f"{named} is not the file that was pinned" in message
        assert f"expected SHA-256 {expected}, found {file_sha256(path)}" in message
    kept = tmp_path / "out/downloads"
    assert sorted(entry.name for entry in kept.iterdir()) == ["train.de.gz", "train.en.gz"]
    assert not (tmp_path / "out/text").exists()


def test_missing_files(command, pin, server, site, capsys):
    pin()
    (site / "train.en.gz").unlink()
    message = error_of(command, capsys, "--mirror", server.mirror)
    assert f"{server.mirror}/train.en.gz could not be fetched: 404 Client Error" in message
    message = error_of(command, capsys, "--mirror", site)
    assert f"{site / 'train.en.gz'} cannot be read (No such file or directory)" in message
    assert "Put train.en.gz as published at https://nowhere.invalid" in message


def test_what_was_fetched_before_a_transfer_broke_off_is_kept(pin, server, tmp_path):
    files, cache = pin(), tmp_path / "cache"
    (cache / ".partial-of-a-killed-run").mkdir(parents=True)
    server.breaks_off = "val.en.gz"
    with pytest.raises(DataPrepError, match=r"val\.en\.gz could not be fetched: IncompleteRead"):
        obtain_files(files, cache, server.mirror)
    assert sorted(path.name for path in cache.iterdir()) == sorted(NAMES[:3])
    server.breaks_off = None
    server.asked.clear()
    paths = obtain_files(files, cache, server.mirror)
    assert server.asked == NAMES[3:]
    assert paths == {name: cache / name for name in NAMES}
    paths["val.en.gz"].write_bytes(b"rotten")
    with pytest.raises(DataPrepError, match="Delete it and run the same command again"):
        obtain_files(files, cache, server.mirror)


def test_an_unreachable_server(pin, tmp_path):
    files = pin()
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(DataPrepError, match=r"train\.de\.gz could not .*Connection refused"):
            obtain_files(files, tmp_path / "cache", mirror)
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(DataPrepError, match="No connection adapters"):
        obtain_files(files, tmp_path / "cache", "other://place")


def test_pooch_is_needed_only_to_fetch(pin, site, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    files = pin()
    assert set(obtain_files(files, tmp_path / "cache", str(site))) == set(NAMES)
    with pytest.raises(DataPrepError, match="pooch, which fetches files, is not installed"):
        obtain_files(files, tmp_path / "cache")


def test_sides_that_do_not_correspond(command, pin, site, capsys):
    write_gzip(site / "val.en.gz", sentences("valid", "en")[:-1])
    pin()
    message = error_of(command, capsys, "--mirror", site)
    assert "val.de.gz and val.en.gz do not correspond: 7 in the one, 6 in the other" in message


def test_other_numbers_of_pairs_than_published(command, pin, site, tmp_path, capsys):
    for language in ("de", "en"):
        write_gzip(site / f"train.{language}.gz", sentences("train", language)[1:])
    pin()
    message = error_of(command, capsys, "--mirror", site)
    assert "expected train 120, valid 7, test 5, found train 119, valid 7, test 5" in message
    assert not (tmp_path / "out/text").exists()


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: whole[:-10],
        lambda whole: b"plain text",
        lambda _: gzip.compress(b"M\xe4dchen"),
    ],
    ids=["truncated", "not gzip", "not UTF-8"],
)
def test_files_that_are_not_gzipped_text(command, pin, site, capsys, damaged):
    path = site / "test_2016_flickr.de.gz"
    path.write_bytes(damaged(path.read_bytes()))
    pin()
    message = error_of(command, capsys, "--mirror", site)
    assert f"{path} cannot be read as gzip-compressed text" in message


def test_options_that_the_corpus_has_no_use_for(command, pin, site, tmp_path, capsys):
    pin()
    for option, value in (("--seed", "2"), ("--wheels", site)):
        message = error_of(command, capsys, option, value)
        assert f"is used as published: {option} has no use for it" in message
    assert prepare.main(["quickstart", "--out", str(tmp_path), "--mirror", str(site)]) == 1
    assert "comes out of wheels: --mirror has no use for it" in capsys.readouterr().err


def test_overlap_counts_sides_and_pairs():
    splits = Splits(
        train=[Pair("a b", "c d"), Pair("e f", "g 1")],
        valid=[Pair("a b", "g 1"), Pair("x", "y")],
        test=[Pair("E F!", "G 2")],
    )
    exact, folded, masked = MATCHES
    assert overlap(splits, ("de", "en")) == {
        "valid": {sense: {"de": 1, "en": 1, "pair": 0} for sense in MATCHES},
        "test": {
            exact: {"de": 0, "en": 0, "pair": 0},
            folded: {"de": 1, "en": 0, "pair": 0},
            masked: {"de": 1, "en": 1, "pair": 1},
        },
    }


def test_multi30k_in_the_table(capsys):
    published = MULTI30K_DE_EN.published
    assert isinstance(published.reader, GzipLines)
    patterns = (published.reader.train, published.reader.valid, published.reader.test)
    wanted = {p.replace("{language}", code) for p in patterns for code in ("de", "en")}
    assert wanted == set(NAMES)
    assert all(len(bytes.fromhex(file.sha256)) == 32 for file in published.files)
    assert all(file.address.startswith("https://") for file in published.files)
    assert QUICKSTART.published is None
    with pytest.raises(SystemExit):
        prepare.main(["--list"])
    assert published.licence in capsys.readouterr().out
