"""Multi30k, IWSLT'14 and WMT'14 in miniature: the real files' names and layout."""

import gzip
import hashlib
import io
import tarfile
from dataclasses import replace
from unittest.mock import Mock

import prepare
import pytest
import torch
from conftest import GRADINIT, SCALES_ALONE, train_here
from dataprep import pipeline
from dataprep.corpora import CORPORA, IWSLT14_DE_EN, MULTI30K_DE_EN, WMT14_EN_DE, WMT14_EN_FR
from fairseq.data import Dictionary, data_utils
from loopback import serve_folder

# Fixtures.
from test_data_prep_pipeline import (  # noqa: F401
    contents,
    error_of,
    fairseq_here,
    instant_fairseq,
    manifest_of,
)

WORDS = {
    "de": ["Haus", "Baum", "Stra\u00dfe", "M\u00e4dchen", "l\u00e4uft", "gr\u00fcn", "zehn"],
    "en": ["house", "tree", "street", "girl", "runs", "green", "ten"],
    "fr": ["maison", "l'arbre", "rue", "fille", "court", "v\u00e9lo", "dix"],
}


def sentence(language, number, ending="."):
    """Numbered, so that none occurs twice."""
    words = WORDS[language]
    chosen = [words[(number * k) % 7] for k in (1, 2, 3)]
    return f"{chosen[0].capitalize()} {chosen[1]} {number}, {chosen[2]}{ending}"


def sentences(language, start, count, ending="."):
    return [sentence(language, start + i, ending) for i in range(count)]


def text(lines, end="\n"):
    return "".join(f"{line}{end}" for line in lines).encode()


def evaluation_set(lines, end="\n"):
    """In WIT3's XML or WMT's SGML."""
    body = [f'<seg id="{i}"> {line} </seg>' for i, line in enumerate(lines, start=1)]
    return text(["<mteval>", '<doc docid="1">', *body, "</doc>", "</mteval>"], end)


def tar(members, mode="w:gz"):
    """The bytes of an archive that holds these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Prepares a corpus from a folder that holds these files; returns the exit status."""
    site = tmp_path / "site"
    site.mkdir()

    def run(corpus, files, *arguments, out="out", mirror=site, **changes):
        (origin,) = corpus.origins
        for name, content in files.items():
            (site / name).write_bytes(content)
        pins = tuple(
            replace(file, digest=f"sha256:{hashlib.sha256(files[file.filename]).hexdigest()}")
            for file in origin.files
        )
        changed = {"vocab_size": 60, "with_text": {}, "disk_bytes": 0} | changes
        miniature = replace(corpus, origins=(replace(origin, files=pins),), **changed)
        monkeypatch.setitem(CORPORA, corpus.name, miniature)
        base = [corpus.name, "--out", str(tmp_path / out), "--mirror", str(mirror)]
        return prepare.main([*base, "--workers", "1", *arguments])

    return run


def lines_of(path):
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


HOSTILE = (
    "a \0 in \0the\0 text",
    "\x01\x02 bell \x07 escape \x1b[2J \x7f",
    # Right-to-left marks, and marks that are never taken back.
    "\u202eright\u202c to \u2067left\u2069 \u05e9\u05dc\u05d5\u05dd \u200f.",
    # Ends of lines for some programs.
    "one\x1ctwo\u0085three\u2028four\u2029five",
    "\u0301\u0302 \ufeff \u200b\u200d \ufffe \U0010ffff \ufffd \U0001f469\u200d\U0001f52c",
    "@@ @-@ </w> \u2581 \u2581\u2581 <unk> <s> </s> <pad> &lt;unk&gt;",
    "w" * 5000,
    "x",
    "",
    " \t \u3000 ",
)


def multi30k():
    """With texts that nobody would write; in validation there are two pairs of training."""
    files = {}
    for language, rows in (("de", HOSTILE), ("en", (*HOSTILE[1:], HOSTILE[0]))):
        train = [*sentences(language, 0, 100), *HOSTILE, *rows]
        valid = [*sentences(language, 0, 1), sentence(language, 1).lower()]
        parts = {"train": train, "val": [*valid, *sentences(language, 1000, 5)]}
        parts["test_2016_flickr"] = sentences(language, 2000, 5)
        for part, lines in parts.items():
            files[f"{part}.{language}.gz"] = gzip.compress(text(lines), mtime=0)
    return files


MULTI30K_PAIRS = {"train": 100 + 2 * len(HOSTILE), "valid": 7, "test": 5}


@pytest.mark.usefixtures("fairseq_here")
def test_multi30k_from_a_server_up_to_a_training(run, tmp_path):
    files, out = multi30k(), tmp_path / "out"
    options = {"vocab_size": 200, "expected": MULTI30K_PAIRS}
    with serve_folder(tmp_path / "site") as mirror:
        assert run(MULTI30K_DE_EN, files, mirror=f"{mirror}/", **options) == 0
    assert sorted(path.name for path in (out / "downloads").iterdir()) == sorted(files)
    manifest = manifest_of(out)
    assert {part: size["pairs"] for part, size in manifest["parts"].items()} == MULTI30K_PAIRS
    found = manifest["held_out_sentences_found_elsewhere"]
    assert found["valid, in train"]["exact"] == {"de": 1, "en": 1, "pair": 1}
    assert found["valid, in train"]["casefold, no punctuation"] == {"de": 2, "en": 2, "pair": 2}
    masked = found["test, in valid"]["also numbers and placeholders masked"]
    assert masked["pair"] > 0 == found["test, in valid"]["exact"]["pair"]

    # No sentence gets lost or moves.
    dictionary = Dictionary.load(str(out / "data-bin/dict.de.txt"))
    for language in ("de", "en"):
        published = gzip.decompress(files[f"train.{language}.gz"]).decode().split("\n")[:-1]
        lines = [" ".join(line.split()) for line in published]
        assert (out / f"text/train.{language}").read_text().split("\n")[:-1] == lines
        binary = data_utils.load_indexed_dataset(
            str(out / f"data-bin/train.de-en.{language}"), dictionary
        )
        # What has no text has no tokens.
        assert [len(row) == 1 for row in binary] == [not line for line in lines]
    options = [*GRADINIT, *SCALES_ALONE, "--max-update", "2", "--no-save"]
    training = train_here(
        out / "data-bin", tmp_path / "run", *options, "--max-source-positions", "100"
    )
    assert training.code == 0, training.output
    assert all(torch.isfinite(tensor).all() for tensor in training.weights.values())


SETS = {"TED.dev2010": 9, "TEDX.dev2012": 7, "TED.tst2010": 8, "TED.tst2011": 6, "TED.tst2012": 5}
TALKS = 40
KEPT = [100 * talk + i for talk in range(TALKS) for i in range(12)]
VALID = KEPT[22::23]
IWSLT_PARTS = {"train": len(KEPT) - len(VALID), "valid": len(VALID), "test": sum(SETS.values())}


def iwslt_members():
    """Training text with talks described in tags, and with pairs that the cleaning removes."""
    members = {"../../../../up": b"a name that is not a path"}
    for language in ("de", "en"):
        lines = []
        for talk in range(TALKS):
            title, description, *spoken = sentences(language, 100 * talk, 12)
            lines += ["<url>http://www.ted.com</url>", "<keywords>talks, a</keywords>"]
            lines += [f"<talkid>{talk}</talkid>", f"<title>{title}</title>"]
            lines += [f"<description>{description}</description>", *spoken]
        lines.append("" if language == "de" else "nobody translated this")
        lines.append(" ".join(["Wort" if language == "de" else "word"] * 176))
        lines.append("eins" if language == "de" else "one two three")
        members[f"de-en/train.tags.de-en.{language}"] = text(lines)
        for number, (name, count) in enumerate(SETS.items()):
            lines = sentences(language, 90_000 + 1_000 * number, count, "\u2019s!")
            members[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = evaluation_set(lines)
    return members


@pytest.mark.usefixtures("fairseq_here")
def test_iwslt(run, tmp_path):
    archive = tar(iwslt_members())
    assert run(IWSLT14_DE_EN, {"de-en.tgz": archive}, expected=IWSLT_PARTS) == 0
    out = tmp_path / "out"
    for language in ("de", "en"):
        assert lines_of(out / f"text/valid.{language}") == [sentence(language, i) for i in VALID]
        train = [sentence(language, i) for i in KEPT if i not in VALID]
        assert lines_of(out / f"text/train.{language}") == train
    # As the published script has it: dev2010 first, plain apostrophes, lower case, Moses's escapes.
    assert lines_of(out / "text/test.en")[0] == sentence("en", 90_000, "'s!")
    tokens = lines_of(out / "tokens/test.en")
    assert tokens[0] == "tree street 90000 , girl &apos;s !"
    pieces = lines_of(out / "subwords/test.en")
    assert pieces != [line.replace("@@ ", "") for line in pieces] == tokens

    manifest = manifest_of(out)
    assert manifest["pairs_read"]["train.tags.de-en.de"] == len(KEPT) + 3
    assert manifest["pairs_removed"] == {"empty": 1, "token-lengths": 2}
    assert not (tmp_path / "up").exists()


def test_other_texts_than_published(run, tmp_path, capsys):
    def error(members):
        files = {"de-en.tgz": tar(members)}
        return error_of(lambda: run(IWSLT14_DE_EN, files, expected=IWSLT_PARTS), capsys)

    members = iwslt_members()
    german = "de-en/train.tags.de-en.de"
    sides = ((code, members[f"de-en/train.tags.de-en.{code}"]) for code in ("de", "en"))
    more = {f"de-en/train.tags.de-en.{code}": content + b"ja\n" for code, content in sides}
    train = IWSLT_PARTS["train"]
    expected = f"expected train {train}, valid 20, test 35, found train {train + 1}"
    assert expected in error(members | more)
    del members[german]
    assert f"does not hold {german}" in error(members)
    assert not (tmp_path / "out/text").exists()


TRAINING = {
    "training/europarl-v7.{}-en": 300,
    "commoncrawl.{}-en": 200,
    "un/undoc.2000.{}-en": 100,
    "training/news-commentary-v9.{}-en": 50,
    "giga-fren.release2.fixed": 150,
}
WMT_ARCHIVES = {
    "training-parallel-europarl-v7.tgz": "training/europarl",
    "training-parallel-commoncrawl.tgz": "commoncrawl",
    "training-parallel-un.tgz": "un/",
    "training-parallel-nc-v9.tgz": "training/news",
    "dev.tgz": "dev/",
    "test-full.tgz": "test-full/",
}


def wmt(other):
    """The archives of WMT'14; of each training text the cleaning is to remove three pairs."""
    members = {}
    for language in (other, "en"):
        for number, (name, count) in enumerate(TRAINING.items()):
            lines = sentences(language, 5_000 * number, count, " \u2013 20 %.")
            lines[7] = "alone" if language == "en" else ""
            lines[8] = "lang " * 251
            lines[9] = "a b c d e f g h i j" if language == "en" else "kurz"
            members[f"{name.format(other)}.{language}"] = text(lines)
        members[f"dev/newstest2013.{language}"] = text(sentences(language, 70_000, 30))
        kind = "src" if language == "en" else "ref"
        members[f"test-full/newstest2014-{other}en-{kind}.{language}.sgm"] = evaluation_set(
            sentences(language, 80_000, 33), end="\r\n"
        )
    archives = {
        archive: tar({name: members[name] for name in members if name.startswith(start)})
        for archive, start in WMT_ARCHIVES.items()
    }
    giga = {f"{n}.gz": gzip.compress(t) for n, t in members.items() if n.startswith("giga-fren")}
    return archives | {"training-giga-fren.tar": tar(giga, mode="w")}


@pytest.mark.usefixtures("fairseq_here")
@pytest.mark.parametrize(
    ("corpus", "other", "train", "removed", "tokens"),
    [
        (
            WMT14_EN_DE,
            "de",
            300 + 200 + 50 - 9,
            {"empty": 3, "too-long": 3, "word-ratio": 3},
            "Baum Stra\u00dfe 1 , M\u00e4dchen - 20 % .",
        ),
        (
            WMT14_EN_FR,
            "fr",
            300 + 200 + 100 + 50 + 150 - 15,
            {"empty": 5, "token-lengths": 10},
            # French splits words behind apostrophes.
            "L&apos; arbre rue 1 , fille - 20 % .",
        ),
    ],
    ids=["de", "fr"],
)
def test_wmt(run, tmp_path, corpus, other, train, removed, tokens):
    held_out = {"valid": 30, "test": 33}
    assert run(corpus, wmt(other), expected={"train": train, **held_out}) == 0
    out = tmp_path / "out"
    assert manifest_of(out)["direction"] == ["en", other]
    assert manifest_of(out)["pairs_removed"] == removed
    for language in (other, "en"):
        assert lines_of(out / f"text/train.{language}")[0] == sentence(language, 0, " \u2013 20 %.")
        assert lines_of(out / f"text/valid.{language}") == sentences(language, 70_000, 30)
        assert lines_of(out / f"text/test.{language}") == sentences(language, 80_000, 33)
    assert lines_of(out / f"tokens/train.{other}")[1] == tokens


@pytest.mark.slow
@pytest.mark.usefixtures("instant_fairseq")
def test_bytes_do_not_depend_on_the_workers(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dataprep.parallel.CHUNK", 50)
    files = wmt("fr")
    for workers in ("1", "3"):
        options = {"out": workers, "expected": {}}
        assert run(WMT14_EN_FR, files, "--workers", workers, **options) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_room_is_asked_for_before_anything_is_fetched(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: Mock(free=900_000_000))
    options = {"disk_bytes": 1_000_000_000, "mirror": "nowhere"}
    error = error_of(lambda: run(WMT14_EN_DE, wmt("de"), **options), capsys)
    assert f"takes some 1.0 GB of disk space, and {tmp_path / 'out'} has 0.9 GB free" in error
