"""IWSLT'14 and WMT'14 in miniature: the real archives' names and layout, served on loopback."""

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import replace

import prepare
import pytest
from dataprep import pipeline
from dataprep.corpora import CORPORA, IWSLT14_DE_EN, WMT14_EN_DE, WMT14_EN_FR
from loopback import serve_folder

# Fixtures.
from test_data_prep_pipeline import fairseq_here, instant_fairseq  # noqa: F401

TALKS = 40
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


def talks(language):
    """WIT3's training file: talks described in tags, with pairs that the cleaning is to remove."""
    lines = []
    for talk in range(TALKS):
        lines += [
            f"<url>http://www.ted.com/talks/{talk}</url>",
            f"<keywords>talks, {language}</keywords>",
            f"<talkid>{talk}</talkid>",
            f"<title>{sentence(language, 100 * talk)}</title>",
            f"<description>{sentence(language, 100 * talk + 1)}</description>",
            *(sentence(language, 100 * talk + 2 + i) for i in range(10)),
        ]
    lines.append("" if language == "de" else "nobody translated this")
    lines.append(" ".join(["Wort" if language == "de" else "word"] * 176))
    lines.append("eins" if language == "de" else "one two three")
    return lines


def evaluation_set(language, count, start, ending="."):
    """An evaluation set in WIT3's XML or WMT's SGML."""
    head = ['<?xml version="1.0" encoding="UTF-8"?>', "<mteval>", f'<refset trglang="{language}">']
    body = [
        f'<seg id="{i + 1}"> {sentence(language, start + i, ending)} </seg>' for i in range(count)
    ]
    return [*head, '<doc docid="1">', *body, "</doc>", "</refset>", "</mteval>"]


def text(lines, end="\n"):
    return "".join(f"{line}{end}" for line in lines).encode()


def tgz(members, mode="w:gz"):
    """The bytes of an archive that holds these files, and the folders that they are in."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for folder in dict.fromkeys(n.rpartition("/")[0] for n in members if "/" in n):
            entry = tarfile.TarInfo(folder)
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


SETS = {"TED.dev2010": 9, "TEDX.dev2012": 7, "TED.tst2010": 8, "TED.tst2011": 6, "TED.tst2012": 5}


def iwslt_members():
    members = {"de-en/README": b"WIT3\n"}
    for language in ("de", "en"):
        members[f"de-en/train.tags.de-en.{language}"] = text(talks(language))
        for number, (name, count) in enumerate(SETS.items()):
            lines = evaluation_set(language, count, 90_000 + 1_000 * number, "\u2019s!")
            members[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = text(lines)
    return members


KEPT = TALKS * 12
IWSLT_PARTS = {"train": KEPT - KEPT // 23, "valid": KEPT // 23, "test": sum(SETS.values())}


TRAINING = {
    "training/europarl-v7.{}-en": 300,
    "commoncrawl.{}-en": 200,
    "un/undoc.2000.{}-en": 100,
    "training/news-commentary-v9.{}-en": 50,
    "giga-fren.release2.fixed": 150,
}


def training_text(language, number, count):
    """Pairs of which the cleaning is to remove three."""
    lines = [sentence(language, 5_000 * number + i, " \u2013 20 %.") for i in range(count)]
    lines[7] = "alone" if language == "en" else ""
    lines[8] = "lang " * 251
    lines[9] = "a b c d e f g h i j" if language == "en" else "kurz"
    return text(lines)


def wmt_archives():
    """The archives of WMT'14, with the members for German and those for French."""
    sides = {}
    for other, pair in (("de", "deen"), ("fr", "fren")):
        for language in (other, "en"):
            for number, (name, count) in enumerate(TRAINING.items()):
                content = training_text(language, number, count)
                sides[f"{name.format(other)}.{language}"] = content
            sides[f"dev/newstest2013.{language}"] = text(
                sentence(language, 70_000 + i) for i in range(30)
            )
            kind = "src" if language == "en" else "ref"
            sides[f"test-full/newstest2014-{pair}-{kind}.{language}.sgm"] = text(
                evaluation_set(language, 33, 80_000), end="\r\n"
            )
    of = {
        "training-parallel-europarl-v7.tgz": "training/europarl",
        "training-parallel-commoncrawl.tgz": "commoncrawl",
        "training-parallel-un.tgz": "un/",
        "training-parallel-nc-v9.tgz": "training/news",
        "dev.tgz": "dev/",
        "test-full.tgz": "test-full/",
    }
    archives = {
        archive: tgz({n: content for n, content in sides.items() if n.startswith(start)})
        for archive, start in of.items()
    }
    giga = {f"{n}.gz": gzip.compress(t) for n, t in sides.items() if n.startswith("giga-fren")}
    return archives | {"training-giga-fren.tar": tgz(giga, mode="w")}


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    for name, content in {"de-en.tgz": tgz(iwslt_members()), **wmt_archives()}.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def pin(site, monkeypatch):
    """Enters the corpora into the table, with the sums and sizes of what the folder holds now."""

    def pinned(file):
        sha256 = hashlib.sha256((site / file.filename).read_bytes()).hexdigest()
        return replace(file, digest=f"sha256:{sha256}")

    def enter():
        held_out = {"valid": 30, "test": 33}
        for corpus, with_text, expected in (
            (IWSLT14_DE_EN, {}, IWSLT_PARTS),
            (WMT14_EN_DE, {"train": 547, **held_out}, held_out),
            (WMT14_EN_FR, held_out, held_out),
        ):
            files = tuple(map(pinned, corpus.origin.files))
            miniature = replace(
                corpus,
                origin=replace(corpus.origin, files=files),
                vocab_size=60,
                with_text=with_text,
                expected=expected,
                disk_bytes=1_000_000,
            )
            monkeypatch.setitem(CORPORA, corpus.name, miniature)

    return enter


@pytest.fixture
def run(tmp_path, site, pin):
    """Runs the command line on what the folder holds now; returns the exit status."""

    def run(corpus, *arguments, out="out", workers=1):
        pin()
        folder = tmp_path / out
        base = [corpus, "--out", str(folder), "--workers", str(workers)]
        return prepare.main([*base, *map(str, arguments)])

    return run


def lines_of(path):
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def error_of(capsys):
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("prepare.py: error: ")]
    return line


@pytest.mark.usefixtures("fairseq_here")
def test_iwslt(run, site, tmp_path):
    with serve_folder(site) as mirror:
        assert run("iwslt14-de-en", "--mirror", mirror) == 0
    out = tmp_path / "out"
    kept = [i for talk in range(TALKS) for i in range(100 * talk, 100 * talk + 12)]
    valid = [number for position, number in enumerate(kept, start=1) if position % 23 == 0]
    for language in ("de", "en"):
        assert lines_of(out / f"text/valid.{language}") == [sentence(language, i) for i in valid]
        train = [sentence(language, i) for i in kept if i not in valid]
        assert lines_of(out / f"text/train.{language}") == train
    # As the published script has it: dev2010 first, plain apostrophes, lower case, Moses's escapes.
    assert lines_of(out / "text/test.en")[0] == sentence("en", 90_000, "'s!")
    assert lines_of(out / "text/test.en")[9] == sentence("en", 91_000, "'s!")
    tokens = lines_of(out / "tokens/test.en")
    assert tokens[0] == "tree street 90000 , girl &apos;s !"
    assert all("@@" not in line for line in tokens)
    pieces = lines_of(out / "subwords/test.en")
    assert [line.replace("@@ ", "") for line in pieces] == tokens

    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert {part: size["pairs"] for part, size in manifest["parts"].items()} == IWSLT_PARTS
    assert manifest["pairs_read"]["train.tags.de-en.de"] == KEPT + 3
    assert manifest["pairs_removed"] == {"empty": 1, "token-lengths": 2}
    tokenisation = manifest["tokenisation"]
    assert tokenisation["name"] == "moses+bpe"
    assert tokenisation["moses"]["lowercase"] is True
    assert set(tokenisation["dictionaries"]) == {"dict.de.txt", "dict.en.txt"}
    dictionaries = [(out / f"data-bin/dict.{code}.txt").read_bytes() for code in ("de", "en")]
    assert dictionaries[0] != dictionaries[1]


@pytest.mark.usefixtures("fairseq_here")
def test_wmt(run, site, tmp_path):
    assert run("wmt14-en-de", "--mirror", site, "--target-lang", "en") == 0
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["direction"] == ["de", "en"]
    assert manifest["pairs_read"] == {
        "europarl-v7.de-en.de": 300,
        "commoncrawl.de-en.de": 200,
        "news-commentary-v9.de-en.de": 50,
        "newstest2013.de": 30,
        "newstest2014-deen-ref.de.sgm": 33,
    }
    assert manifest["pairs_removed"] == {"empty": 3, "too-long": 3, "word-ratio": 3}
    assert lines_of(out / "text/test.de") == [sentence("de", 80_000 + i) for i in range(33)]
    assert lines_of(out / "text/train.en")[0].endswith(" \u2013 20 %.")
    assert lines_of(out / "tokens/train.en")[0] == "House house 0 , house - 20 % ."
    assert (out / "data-bin/dict.de.txt").read_bytes() == (
        out / "data-bin/dict.en.txt"
    ).read_bytes()


@pytest.mark.usefixtures("fairseq_here")
def test_wmt_english_french(run, site, tmp_path):
    assert run("wmt14-en-fr", "--mirror", site) == 0
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["direction"] == ["en", "fr"]
    assert manifest["pairs_read"] == {
        "europarl-v7.fr-en.fr": 300,
        "commoncrawl.fr-en.fr": 200,
        "undoc.2000.fr-en.fr": 100,
        "news-commentary-v9.fr-en.fr": 50,
        "giga-fren.release2.fixed.fr.gz": 150,
        "newstest2013.fr": 30,
        "newstest2014-fren-ref.fr.sgm": 33,
    }
    assert manifest["pairs_removed"] == {"empty": 5, "token-lengths": 10}
    sizes = {part: size["pairs"] for part, size in manifest["parts"].items()}
    assert sizes == {"train": 785, "valid": 30, "test": 33}
    for language in ("fr", "en"):
        last = sentence(language, 5_000 * 4 + 149, " \u2013 20 %.")  # of the compressed member
        assert lines_of(out / f"text/train.{language}")[-1] == last
        assert lines_of(out / f"text/valid.{language}")[0] == sentence(language, 70_000)
        assert lines_of(out / f"text/test.{language}")[-1] == sentence(language, 80_032)
    # French splits words behind apostrophes.
    assert lines_of(out / "tokens/train.fr")[1] == "L&apos; arbre rue 1 , fille - 20 % ."
    joined = [(out / f"data-bin/dict.{language}.txt").read_bytes() for language in ("fr", "en")]
    assert joined[0] == joined[1]


def test_both_wmt_corpora_share_what_they_fetch():
    english_french, english_german = WMT14_EN_FR.origin.files, WMT14_EN_DE.origin.files
    more = [file.filename for file in english_french if file not in english_german]
    assert more == ["training-parallel-un.tgz", "training-giga-fren.tar"]
    assert set(english_german) < set(english_french)


@pytest.mark.slow
@pytest.mark.usefixtures("instant_fairseq")
def test_bytes_do_not_depend_on_the_workers(run, site, tmp_path, monkeypatch):
    monkeypatch.setattr("dataprep.parallel.CHUNK", 50)
    assert run("wmt14-en-fr", "--mirror", site, out="one") == 0
    assert run("wmt14-en-fr", "--mirror", site, out="three", workers=3) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_other_texts_than_published(run, site, tmp_path, capsys):
    members = iwslt_members()
    for language in ("de", "en"):
        lines = evaluation_set(language, 8, 92_000)
        members[f"de-en/IWSLT14.TED.tst2012.de-en.{language}.xml"] = text(lines)
    (site / "de-en.tgz").write_bytes(tgz(members))
    assert run("iwslt14-de-en", "--mirror", site) == 1
    error = error_of(capsys)
    assert f"expected train {IWSLT_PARTS['train']}, valid 20, test 35, found" in error
    assert error.split("found")[1].startswith(f" train {IWSLT_PARTS['train']}, valid 20, test 38")

    german = "de-en/train.tags.de-en.de"
    (site / "de-en.tgz").write_bytes(tgz(members | {german: members[german] + b"\xff\n"}))
    assert run("iwslt14-de-en", "--mirror", site) == 1
    assert f"{german} in de-en.tgz cannot be read as text: line 604 is not" in error_of(capsys)
    del members[german]
    (site / "de-en.tgz").write_bytes(tgz(members))
    assert run("iwslt14-de-en", "--mirror", site) == 1
    assert f"does not hold {german}" in error_of(capsys)
    assert not (tmp_path / "out/text").exists()


@pytest.mark.usefixtures("instant_fairseq")
def test_room_is_asked_for_before_anything_is_fetched(run, site, tmp_path, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 900_000})
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: usage)
    assert run("wmt14-en-de", "--mirror", site) == 1
    error = error_of(capsys)
    assert "takes some 1 MB of disk space" in error
    assert f"{tmp_path / 'out'} has 1 MB free" in error
    # What an earlier run left there counts.
    (tmp_path / "out/big").write_bytes(bytes(200_000))
    assert run("wmt14-en-de", "--mirror", site) == 0
    # What is finished takes no more.
    (tmp_path / "out/big").unlink()
    usage.free = 0
    assert run("wmt14-en-de", "--mirror", site) == 0
