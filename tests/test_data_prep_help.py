"""LibreOffice's manual: its pages, and the Debian packages that they come in, in miniature."""

import shutil
import subprocess

import pytest
from dataprep import DataPrepError, Pair
from dataprep.help_pages import is_page, read_pages
from dataprep.packages import obtain_package, read_package

PACKAGE = "libreoffice-help-de"
NOTHING_LEFT_OUT = {"unpaired": 0, "ambiguous": 0, "code": 0}


def page_of(body):
    head = "<head><title>A title</title></head>"
    footer = '<footer><p id="bm_module">Not translated</p><p>Title is: A title</p></footer>'
    return f"<!DOCTYPE html>\n<html>{head}\n<body>{body}{footer}</body></html>".encode()


def help_files(folder, pages):
    """The pages of a package; `pages` has what is in the body of each."""
    place = f"usr/share/libreoffice/help/{folder}"
    return {f"{place}/{page}": page_of(body) for page, body in pages.items()}


def read_help(german, english):
    """Read pages given by their bodies."""
    both = help_files("de", german), help_files("en-US", english)
    return read_pages(*both, ("de", "en"))


def test_paragraphs_align_by_page_and_id():
    german = {
        "text/a/one.html": '<h1 id="hd_id1">Titel</h1><p id="par_id2">Erster</p>'
        '<table><td><p id="par_idN10B3">Zelle</p></td></table><p id="par_id9">Nur hier</p>',
        "text/b.html": '<p id="par_id2">Ein anderer</p>',
        "text/alone.html": '<p id="par_id2">Nur auf Deutsch</p>',
    }
    english = {
        "text/b.html": '<p id="par_id2">Another</p>',
        "text/a/one.html": '<table><td><p id="par_idN10B3">Cell</p></td></table>'
        '<p id="par_id2">First</p><p>without an id</p><h2 id="hd_id1">Heading</h2>',
    }
    pairs, left_out = read_help(german, english)
    assert pairs == [
        Pair("Titel", "Heading"),
        Pair("Erster", "First"),
        Pair("Zelle", "Cell"),
        Pair("Ein anderer", "Another"),
    ]
    assert left_out == NOTHING_LEFT_OUT | {"unpaired": 2}
    assert read_help(dict(reversed(german.items())), english) == (pairs, left_out)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("Choose\n  <span>File - <b>Open</b></span>,\tthen", "Choose File - Open, then"),
        ("One<br>two <br/> three", "One two three"),
        ("Caf&eacute; &amp; &#8222;Tee&#8220;&nbsp;&lt;5", "Caf\u00e9 & \u201eTee\u201c <5"),
        ("Click <img src='x.svg' alt='Icon Open'> now", "Click now"),
        ('<a name="x"></a><a href="y.html">See</a> <!-- a comment -->there', "See there"),
        ('<span class="bug">[text/x.xhp#y not found].</span>', ""),
        ('The <span class="literal">Step</span> value', "The Step value"),
    ],
)
def test_text_of_a_paragraph(body, text):
    page = {"text/a.html": f'<div><p class="paragraph" id="par_id1">{body}</p></div>'}
    assert read_help(page, page) == ([Pair(text, text)], NOTHING_LEFT_OUT)


@pytest.mark.parametrize("classes", [("MAC", ""), ("WRITER", "CALC")])
def test_one_variant_is_taken_the_same_in_both_languages(classes):
    """Of text that differs by system or program; the default has no class."""
    spans = [f'<span class="{name}" id="{name}x_1">{name or "usual"}</span>' for name in classes]
    page, other = (
        {"text/a.html": f'<p id="par_id1">See <span class="switchinline">{"".join(s)}</span>.</p>'}
        for s in (spans, spans[::-1])
    )
    text = f"See {min(classes) or 'usual'}."
    assert read_help(page, other)[0] == [Pair(text, text)]


def test_an_id_with_several_texts_gives_no_pair():
    german = {"text/a.html": '<p id="par_id1">Eins</p><p id="par_id2">Zwei</p>' * 2}
    english = {
        "text/a.html": '<p id="par_id1">One</p><p id="par_id2">Two</p>'
        '<p id="par_id1"> One <b></b></p><p id="par_id2">Too</p>'
    }
    expected = [Pair("Eins", "One")], NOTHING_LEFT_OUT | {"ambiguous": 1}
    assert read_help(german, english) == expected


@pytest.mark.parametrize(
    "code",
    [
        '<p id="par_id1" class="code">Print x</p>',
        '<p id="par_id1"><span class="literal">COM.SWITCH</span>, <b class="input">=A1</b>.</p>',
        '<pre><code><p id="par_id1">\' a comment in a program</p></code></pre>',
    ],
)
def test_code_is_left_out(code):
    prose = '<p id="par_id1">Prose</p>'
    for german, english in ((code, prose), (prose, code)):
        found = read_help({"text/a.html": german}, {"text/a.html": english})
        assert found == ([], NOTHING_LEFT_OUT | {"code": 1})


def test_folder_must_be_of_the_language():
    pages = help_files("pt-BR", {"text/a.html": '<p id="par_id1">Text</p>'})
    assert read_pages(pages, pages, ("pt-br", "pt"))[0] == [Pair("Text", "Text")]
    with pytest.raises(DataPrepError, match=r"in 'pt-pt': it has pages in pt-BR\."):
        read_pages(pages, pages, ("pt-br", "pt-pt"))


# ---- Packages.


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_packages_are_read_without_writing(tmp_path, compression):
    root, path = tmp_path / "root", tmp_path / "a.deb"
    page = "usr/share/libreoffice/help/de/text/a.html"
    files = {page: b"one", "usr/share/libreoffice/help/de/contents.js": b"two"}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "link").symlink_to("/etc/passwd")
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN/control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
    )
    subprocess.run(["dpkg-deb", f"-Z{compression}", "--build", root, path], check=True)
    shutil.rmtree(root)
    assert read_package(path, lambda name: True) == files
    assert read_package(path, is_page) == {page: b"one"}
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataPrepError, match=r"dpkg-deb .*a\.deb is damaged, delete it"):
        read_package(path, is_page)


def test_packages_are_fetched_once(tmp_path, monkeypatch):
    cache, program = tmp_path / "cache", tmp_path / "apt-get"
    monkeypatch.setenv("PATH", f"{tmp_path}")
    with pytest.raises(DataPrepError, match=r"There is no apt-get .*\.debian\.org .*--mirror"):
        obtain_package(PACKAGE, cache, None)
    program.write_text("#!/bin/sh\necho 'E: no such package' >&2; exit 100\n")
    program.chmod(0o755)
    with pytest.raises(DataPrepError, match="E: no such package Run `apt-get update`"):
        obtain_package(PACKAGE, cache, None)
    program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls; : >"$2"_1_all.deb\n')
    path = cache / f"{PACKAGE}_1_all.deb"
    for mirror in (None, None, str(cache)):
        assert obtain_package(PACKAGE, cache, mirror) == path
    assert (tmp_path / "calls").read_text() == f"download {PACKAGE}\n"
    assert list(cache.iterdir()) == [path]
