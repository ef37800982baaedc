"""LibreOffice's manual: its pages, and the Debian packages that they come in, in miniature."""

import shutil
import subprocess
from pathlib import Path

import pytest
from dataprep import DataPrepError, help_pages
from dataprep.corpora import LIBREOFFICE_HELP
from dataprep.help_pages import AlignedPages, read_pages
from dataprep.packages import check_versions, obtain_packages, package_version, read_members
from dataprep.pairs import Pair

DE, EN = "libreoffice-help-de", "libreoffice-help-en-us"
VERSION = "4:7.4.7-1+deb12u14"
NOTHING_LEFT_OUT = {"unpaired": 0, "ambiguous": 0, "code": 0}

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def page_of(body):
    head = "<head><title>A title</title></head>"
    footer = '<footer><p id="bm_module">Not translated</p><p>Title is: A title</p></footer>'
    return f"<!DOCTYPE html>\n<html>{head}\n<body>{body}{footer}</body></html>".encode()


def help_files(folder, pages):
    """What a package of the manual holds; `pages` has what is in the body of each page."""
    place = f"usr/share/libreoffice/help/{folder}"
    files = {f"{place}/{page}": page_of(body) for page, body in pages.items()}
    return files | {
        f"{place}/contents.js": b"no page",
        f"{place}/noscript.html": page_of("no text"),
    }


@pytest.fixture
def packages(monkeypatch):
    """The files in packages, by the package, which is not there."""
    found = {}

    def read(path, wanted):
        return ((name, content) for name, content in found[path].items() if wanted(name))

    monkeypatch.setattr(help_pages, "read_members", read)
    return found


@pytest.fixture
def read_help(packages):
    """Read pages given by their bodies; those in English are in their own folder, en-US."""

    def read(german, english, languages=("de", "en")) -> AlignedPages:
        packages[Path("de")] = help_files("de", german)
        packages[Path("en")] = help_files("en-US", english)
        first, second = (Path(language[:2]) for language in languages)
        return read_pages(first, second, languages)

    return read


def test_paragraphs_align_by_page_and_id(read_help):
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
    aligned = read_help(german, english)
    assert aligned.pairs == [
        Pair("Titel", "Heading"),
        Pair("Erster", "First"),
        Pair("Zelle", "Cell"),
        Pair("Ein anderer", "Another"),
    ]
    assert aligned.left_out == NOTHING_LEFT_OUT | {"unpaired": 2}
    assert read_help(dict(reversed(german.items())), english) == aligned
    swapped = read_help(german, english, ("en-us", "de"))
    assert {Pair(p.second, p.first) for p in swapped.pairs} == set(aligned.pairs)
    assert swapped.left_out == aligned.left_out


def test_pages_come_in_the_order_of_their_paths(read_help):
    pages = {f"text/{n}.html": f'<p id="par_id1">Page {n}</p>' for n in (3, 0, 7, 5, 1, 6, 2, 4)}
    pairs = read_help(pages, pages).pairs
    assert [pair.first for pair in pairs] == [f"Page {n}" for n in range(8)]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("Choose\n  <span>File - <b>Open</b></span>,\tthen", "Choose File - Open, then"),
        ("Gr\u00f6\u00dfe \u5927\u5c0f", "Gr\u00f6\u00dfe \u5927\u5c0f"),
        ("One<br>two <br/> three", "One two three"),
        ("Caf&eacute; &amp; &#8222;Tee&#8220;&nbsp;&lt;5", "Caf\u00e9 & \u201eTee\u201c <5"),
        ("Click <img src='x.svg' alt='Icon Open'> now", "Click now"),
        ('<a name="x"></a><a href="y.html">See</a> <!-- a comment -->there', "See there"),
        ("Press <i>F<b>9</i></b> or not</span>", "Press F9 or not"),
        ('<span class="bug">[text/x.xhp#y not found].</span>', ""),
        ('The <span class="literal">Step</span> value', "The Step value"),
        ("42", "42"),
    ],
)
def test_text_of_a_paragraph(read_help, body, text):
    page = {"text/a.html": f'<div><p class="paragraph" id="par_id1">{body}</p></div>'}
    aligned = read_help(page, page)
    assert aligned.pairs == [Pair(text, text)]
    assert aligned.left_out == NOTHING_LEFT_OUT


def variants(*texts):
    """Text that differs by system or program, as (class, text); the default has no class."""
    spans = (
        f'<span hidden="true" id="{name or "default"}x_1"{name and f" class={name}"}>{text}</span>'
        for name, text in texts
    )
    return f'<p id="par_id1">Press <span class="switchinline">{"".join(spans)}</span> now</p>'


def test_one_variant_is_taken_the_same_in_both_languages(read_help):
    pages = {
        "text/a.html": variants(("MAC", "Command+F9"), ("", "Ctrl+F9")),
        "text/b.html": variants(("WRITER", "Text"), ("CALC", "Sheet")),
        "text/c.html": variants(("CALC", "Sheet"), ("WRITER", "Text")),
    }
    pairs = read_help(pages, pages).pairs
    assert [pair.first for pair in pairs] == [
        "Press Ctrl+F9 now",
        "Press Sheet now",
        "Press Sheet now",
    ]


def test_an_id_with_several_texts_gives_no_pair(read_help):
    german = {"text/a.html": '<p id="par_id1">Eins</p><p id="par_id2">Zwei</p>' * 2}
    english = {
        "text/a.html": '<p id="par_id1">One</p><p id="par_id2">Two</p>'
        '<p id="par_id1"> One <b></b></p><p id="par_id2">Too</p>'
    }
    aligned = read_help(german, english)
    assert aligned.pairs == [Pair("Eins", "One")]
    assert aligned.left_out == NOTHING_LEFT_OUT | {"ambiguous": 1}


@pytest.mark.parametrize(
    "code",
    [
        '<p id="par_id1" class="code">Print x</p>',
        '<p id="par_id1"><span class="literal">COM.SWITCH</span>, <b class="input">=A1</b>.</p>',
        '<pre><code><p id="par_id1">\' a comment in a program</p></code></pre>',
    ],
)
def test_code_is_left_out(read_help, code):
    prose = '<p id="par_id1">Prose</p>'
    for german, english in ((code, prose), (prose, code)):
        aligned = read_help({"text/a.html": german}, {"text/a.html": english})
        assert aligned.pairs == []
        assert aligned.left_out == NOTHING_LEFT_OUT | {"code": 1}


@pytest.mark.parametrize(
    ("folder", "language", "found"),
    [
        ("pt-BR", "pt-br", True),
        ("pt-BR", "pt", True),
        ("pt-BR", "pt-pt", False),
        ("pt", "pt-br", False),
        ("de", "d", False),
    ],
)
def test_folder_must_be_of_the_language(packages, folder, language, found):
    path = Path("package")
    packages[path] = help_files(folder, {"text/a.html": '<p id="par_id1">Text</p>'})
    if found:
        assert len(read_pages(path, path, (language, language)).pairs) == 1
    else:
        with pytest.raises(DataPrepError, match=rf"in '{language}': it has pages in {folder}\."):
            read_pages(path, path, (language, language))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"usr/share/doc/x/copyright": b"x"}, "is not LibreOffice's help in 'en': .* no language"),
        (
            {"usr/share/libreoffice/help/en-US/text/a.html": b" "},
            r"help/en-US/text/a\.html in a\.deb is not a page of HTML",
        ),
    ],
)
def test_packages_of_something_else(packages, files, expected):
    packages[Path("a.deb")] = files
    with pytest.raises(DataPrepError, match=expected):
        read_pages(Path("a.deb"), Path("a.deb"), ("en", "en"))


# ---- Packages.


def write_deb(folder, package, version=VERSION, compression="xz", files=()):
    """A package under the name that apt-get gives it."""
    path = folder / f"{package}_{version.replace(':', '%3a')}_all.deb"
    root = folder / "root"
    (root / "DEBIAN").mkdir(parents=True)
    control = {"Package": package, "Version": version, "Architecture": "all"}
    control |= {"Maintainer": "a test <a@b.c>", "Description": "a miniature"}
    text = "".join(f"{name}: {value}\n" for name, value in control.items())
    (root / "DEBIAN/control").write_text(text)
    for name, content in dict(files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "link").symlink_to("/etc/passwd")
    command = ["dpkg-deb", f"-Z{compression}", "--root-owner-group", "--build", root, path]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(root)
    return path


def write_both(folder, versions=(VERSION, VERSION)):
    folder.mkdir()
    return [write_deb(folder, *both) for both in zip((DE, EN), versions, strict=True)]


@needs_dpkg
@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_packages_are_read_without_writing(tmp_path, compression):
    files = {"usr/a": b"one", "usr/b": b"two"}
    path = write_deb(tmp_path, DE, compression=compression, files=files)
    assert package_version(path) == VERSION
    assert dict(read_members(path, lambda name: True)) == files
    assert list(read_members(path, lambda name: name == "usr/b")) == [("usr/b", b"two")]
    assert list(tmp_path.iterdir()) == [path]


@needs_dpkg
@pytest.mark.parametrize("length", [0, 100, -100])
def test_damaged_packages(tmp_path, length):
    path = write_deb(tmp_path, DE, files={"a": bytes(range(256)) * 40})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(
        DataPrepError, match=r"all\.deb cannot be read as a Debian package: .*Delete"
    ):
        list(read_members(path, lambda name: True))


def test_reading_packages_needs_dpkg_deb(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataPrepError, match=r"needs the program dpkg-deb, .* Install dpkg"):
        package_version(tmp_path / "a.deb")


@needs_dpkg
def test_packages_of_a_folder(tmp_path):
    german, english = write_both(tmp_path / "folder")
    write_deb(tmp_path / "folder", f"{DE}-extra")
    paths = obtain_packages([DE, EN], tmp_path / "cache", tmp_path / "folder")
    assert paths == {DE: german, EN: english}
    assert not (tmp_path / "cache").exists()


def test_folder_without_the_packages(tmp_path):
    for name in (f"{DE}_1_all.deb", f"{DE}_2_all.deb"):
        (tmp_path / name).touch()
    with pytest.raises(DataPrepError, match=rf"holds 2 files of {DE}: .*Leave only one"):
        obtain_packages([DE, EN], tmp_path, tmp_path)
    with pytest.raises(DataPrepError, match=rf"holds no {EN}_VERSION.*packages.debian.org"):
        obtain_packages([EN], tmp_path, tmp_path)


@needs_dpkg
def test_versions_must_fit_together(tmp_path):
    write_both(tmp_path / "ubuntu", ("1:7.4.7-0ubuntu1", VERSION))
    check_versions(obtain_packages([DE, EN], tmp_path, tmp_path / "ubuntu"))
    write_both(tmp_path / "mixed", ("4:25.2.3-2", VERSION))
    with pytest.raises(DataPrepError) as caught:
        LIBREOFFICE_HELP.origin.obtain(("de", "en"), tmp_path, str(tmp_path / "mixed"))
    for shown in (f"{DE} 4:25.2.3-2", f"{EN} {VERSION}", str(tmp_path / "mixed")):
        assert shown in str(caught.value)


@pytest.fixture
def apt_get(tmp_path, monkeypatch):
    """Install an apt-get in which a script's body runs, after writing down what it was told."""

    def install(body):
        program = tmp_path / "bin" / "apt-get"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n{body}\n')
        program.chmod(0o755)

    (tmp_path / "calls").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return install


@needs_dpkg
def test_packages_are_fetched_once(tmp_path, apt_get):
    archive, cache = tmp_path / "archive", tmp_path / "cache"
    expected = [cache / path.name for path in write_both(archive)]
    apt_get(f'shift; for name; do cp {archive}/"$name"_* .; done; echo "W: as root" >&2')
    paths = obtain_packages([DE, EN], cache)
    assert paths == dict(zip((DE, EN), expected, strict=True))
    assert obtain_packages([DE, EN], cache) == paths
    paths[EN].unlink()
    assert obtain_packages([DE, EN], cache) == paths
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"download {DE} {EN}", f"download {EN}"]
    assert sorted(cache.iterdir()) == expected


def test_complaint_of_apt_get_is_told(tmp_path, apt_get):
    complaints = "echo 'E: Unable to locate package' >&2; echo 'W: as root' >&2"
    apt_get(f"touch {DE}_1_all.deb; {complaints}; exit 100")
    cache = tmp_path / "cache"
    with pytest.raises(DataPrepError, match=r"E: Unable to locate package\. Run `apt-get update`"):
        obtain_packages([DE, EN], cache)
    assert list(cache.iterdir()) == []


def test_fetching_packages_without_apt_get(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = rf"no apt-get .*fetch {DE} and {EN} from packages.debian.org .*--mirror"
    with pytest.raises(DataPrepError, match=expected):
        obtain_packages([DE, EN], tmp_path / "cache")
