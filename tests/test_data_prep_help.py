"""Debian packages and the manual's pages in them; the packages are miniatures made here."""

import contextlib
import gzip
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
from functools import partial

import pytest
from dataprep import DataPrepError, packages
from dataprep.help_pages import read_pages
from dataprep.packages import obtain_packages, package_version, read_members
from dataprep.pairs import Pair

DE, EN = "libreoffice-help-de", "libreoffice-help-en-us"
VERSION = "4:7.4.7-1+deb12u14"
NOTHING_LEFT_OUT = {"unpaired": 0, "ambiguous": 0, "code": 0}

needs_zstd = pytest.mark.skipif(
    not (shutil.which("zstd") and shutil.which("unzstd")), reason="needs the program zstd"
)


def zstd(content):
    return subprocess.run(["zstd", "-q"], input=content, capture_output=True, check=True).stdout


COMPRESSORS = {".gz": partial(gzip.compress, mtime=0), ".xz": lzma.compress, ".zst": zstd}
EACH_COMPRESSION = [".gz", ".xz", pytest.param(".zst", marks=needs_zstd)]


def ar_header(name, size):
    return f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{size:<10}`\n".encode()


def write_ar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"!<arch>\n"
    for name, data in members:
        content += ar_header(name, len(data)) + data + b"\n" * (len(data) % 2)
    path.write_bytes(content)
    return path


def tar_of(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_deb(path, data, version=VERSION, suffix=".xz"):
    """A package; `data` is its data.tar, or the content of its files by their name."""
    control = tar_of({"control": f"Package: x\nVersion: {version}\nSize: 1\n".encode()})
    data = data if isinstance(data, bytes) else tar_of(data)
    compress = COMPRESSORS[suffix]
    members = [("debian-binary", b"2.0\n"), (f"control.tar{suffix}", compress(control))]
    return write_ar(path, [*members, (f"data.tar{suffix}", compress(data))])


def members_of(path):
    return list(read_members(path, lambda name: True))


def write_help(path, folder, pages):
    """A package of the manual; `pages` holds what is in the body of each page."""
    place = f"usr/share/libreoffice/help/{folder}"
    files = {f"{place}/{page}": page_of(body) for page, body in pages.items()}
    files |= {f"{place}/contents.js": b"no page", f"{place}/noscript.html": page_of("no text")}
    return write_deb(path, files)


def page_of(body):
    head = "<head><title>A title</title></head>"
    footer = '<footer><p id="bm_module">Not translated</p><p>Title is: A title</p></footer>'
    return f"<!DOCTYPE html>\n<html>{head}\n<body>{body}{footer}</body></html>".encode()


def read_help(tmp_path, german, english):
    """Read pages given by their bodies; those in English are in their own folder, en-US."""
    return read_pages(
        write_help(tmp_path / "de.deb", "de", german),
        write_help(tmp_path / "en.deb", "en-US", english),
        ("de", "en"),
    )


def test_paragraphs_align_by_page_and_id(tmp_path):
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
    aligned = read_help(tmp_path, german, english)
    assert aligned.pairs == [
        Pair("Titel", "Heading"),
        Pair("Erster", "First"),
        Pair("Zelle", "Cell"),
        Pair("Ein anderer", "Another"),
    ]
    assert aligned.left_out == NOTHING_LEFT_OUT | {"unpaired": 2}
    again = tmp_path / "again"
    assert read_help(again, dict(reversed(german.items())), english) == aligned
    swapped = read_pages(tmp_path / "en.deb", tmp_path / "de.deb", ("en-us", "de"))
    assert {Pair(p.second, p.first) for p in swapped.pairs} == set(aligned.pairs)
    assert swapped.left_out == aligned.left_out


def test_pages_come_in_the_order_of_their_paths(tmp_path):
    pages = {f"text/{n}.html": f'<p id="par_id1">Page {n}</p>' for n in (3, 0, 7, 5, 1, 6, 2, 4)}
    pairs = read_help(tmp_path, pages, pages).pairs
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
def test_text_of_a_paragraph(tmp_path, body, text):
    page = {"text/a.html": f'<div><p class="paragraph" id="par_id1">{body}</p></div>'}
    aligned = read_help(tmp_path, page, page)
    assert aligned.pairs == [Pair(text, text)]
    assert aligned.left_out == NOTHING_LEFT_OUT


def variants(*texts):
    """Text that differs by system or program, as (class, text); the default has no class."""
    spans = (
        f'<span hidden="true" id="{name or "default"}x_1"{name and f" class={name}"}>{text}</span>'
        for name, text in texts
    )
    return f'<p id="par_id1">Press <span class="switchinline">{"".join(spans)}</span> now</p>'


def test_one_variant_is_taken_the_same_in_both_languages(tmp_path):
    pages = {
        "text/a.html": variants(("MAC", "Command+F9"), ("", "Ctrl+F9")),
        "text/b.html": variants(("WRITER", "Text"), ("CALC", "Sheet")),
        "text/c.html": variants(("CALC", "Sheet"), ("WRITER", "Text")),
    }
    pairs = read_help(tmp_path, pages, pages).pairs
    assert [pair.first for pair in pairs] == [
        "Press Ctrl+F9 now",
        "Press Sheet now",
        "Press Sheet now",
    ]


def test_an_id_with_several_texts_gives_no_pair(tmp_path):
    german = {"text/a.html": '<p id="par_id1">Eins</p><p id="par_id2">Zwei</p>' * 2}
    english = {
        "text/a.html": '<p id="par_id1">One</p><p id="par_id2">Two</p>'
        '<p id="par_id1"> One <b></b></p><p id="par_id2">Too</p>'
    }
    aligned = read_help(tmp_path, german, english)
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
def test_code_is_left_out(tmp_path, code):
    prose = '<p id="par_id1">Prose</p>'
    for german, english in ((code, prose), (prose, code)):
        aligned = read_help(tmp_path, {"text/a.html": german}, {"text/a.html": english})
        assert aligned.pairs == []
        assert aligned.left_out == NOTHING_LEFT_OUT | {"code": 1}


@pytest.mark.parametrize(
    ("folder", "language", "found"),
    [
        ("pt-BR", "pt-br", True),
        ("pt-BR", "pt-BR", True),
        ("pt-BR", "pt", True),
        ("de", "de", True),
        ("pt-BR", "pt-pt", False),
        ("pt", "pt-br", False),
        ("de", "d", False),
    ],
)
def test_the_folder_must_be_of_the_language(tmp_path, folder, language, found):
    path = write_help(tmp_path / "a.deb", folder, {"text/a.html": '<p id="par_id1">Text</p>'})
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
            r"help/en-US/text/a\.html in .*a\.deb is not a page of HTML",
        ),
    ],
)
def test_packages_of_something_else(tmp_path, files, expected):
    path = write_deb(tmp_path / "a.deb", files)
    with pytest.raises(DataPrepError, match=expected):
        read_pages(path, path, ("en", "en"))


@pytest.mark.parametrize("suffix", EACH_COMPRESSION)
def test_packages_are_read(tmp_path, suffix):
    path = write_deb(tmp_path / "a.deb", {"usr/a": b"one", "usr/b": b"two"}, suffix=suffix)
    assert package_version(path) == VERSION
    assert list(read_members(path, lambda name: name == "usr/b")) == [("usr/b", b"two")]


def test_nothing_but_plain_files_is_read_and_nothing_written(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("../../escape", "/etc/absolute"):
            archive.addfile(tarfile.TarInfo(name))
        for number, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
        ):
            member = tarfile.TarInfo(f"usr/{number}")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    path = write_deb(tmp_path / "a.deb", stream.getvalue())
    assert members_of(path) == [("../../escape", b""), ("/etc/absolute", b"")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.deb"]


def tar_header(name, size=0, kind=tarfile.REGTYPE):
    """A member's header, also with sizes that tarfile would not write."""
    member = tarfile.TarInfo(name)
    member.type = kind
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size.to_bytes(12, "big", signed=True) if size < 0 else b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


LONG_NAME = tar_header("././@LongLink", 5, tarfile.GNUTYPE_LONGNAME) + b"name\0" + bytes(507)
HOSTILE_DATA = {
    "a negative size": tar_header("a") + tar_header("b", -512) + bytes(1024),
    "a sparse member of negative size": (
        tar_header("a") + tar_header("b", -512, tarfile.GNUTYPE_SPARSE) + bytes(1024)
    ),
    "a tower of names": LONG_NAME * 3000 + tar_header("a") + bytes(1024),
    "less than it claims": tar_header("a", 4000) + bytes(512),
    "no tar": b"text",
}


@pytest.mark.parametrize("data", HOSTILE_DATA.values(), ids=HOSTILE_DATA)
def test_hostile_data_is_refused(tmp_path, data):
    path = write_deb(tmp_path / "a.deb", data)
    with pytest.raises(DataPrepError, match=r"a\.deb cannot be read as a Debian package: .*Delete"):
        members_of(path)


def test_a_sparse_file_is_not_read(tmp_path):
    """It would be a gigabyte out of one block."""
    header = bytearray(tar_header("a", kind=tarfile.GNUTYPE_SPARSE))
    header[483:495] = b"%011o\0" % 2**30
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert members_of(write_deb(tmp_path / "a.deb", bytes(header) + bytes(1024))) == []


@pytest.mark.parametrize("suffix", EACH_COMPRESSION)
def test_packages_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(packages, "MAX_UNPACKED_BYTES", 20_000)
    assert members_of(write_deb(tmp_path / "a.deb", {"a": bytes(5_000)}, suffix=suffix))
    path = write_deb(tmp_path / "b.deb", {"a": bytes(10**7)}, suffix=suffix)
    with pytest.raises(DataPrepError, match=r"data\.tar in .*b\.deb has more than the 20,000"):
        members_of(path)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([], "0 members called data.tar"),
        ([("data.tar.xz", b""), ("data.tar.gz", b"")], "2 members called data.tar"),
        ([("data.tar.lz4", b"x")], "compressed in an unknown way"),
        ([("data.tar.xz", b"text")], "cannot be read"),
        ([("data.tar.gz", b"text")], "cannot be read"),
        pytest.param([("data.tar.zst", b"text")], "unzstd reports damage", marks=needs_zstd),
    ],
)
def test_packages_of_other_members_are_refused(tmp_path, members, expected):
    path = write_ar(tmp_path / "a.deb", members)
    with pytest.raises(DataPrepError, match=expected):
        members_of(path)


def test_a_member_of_negative_size_does_not_hang(tmp_path):
    path = tmp_path / "a.deb"
    path.write_bytes(b"!<arch>\n" + ar_header("data.tar.xz", -60))
    with pytest.raises(DataPrepError, match="negative size"):
        members_of(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_damage_is_noticed_wherever_it_is(tmp_path, suffix):
    whole = write_deb(tmp_path / "a.deb", {"a": bytes(range(256)) * 40}, suffix=suffix)
    content, read = whole.read_bytes(), members_of(whole)
    damaged = tmp_path / "b.deb"
    for place in range(0, len(content) - 1, 11):  # the last byte may be padding
        damaged.write_bytes(content[:place])
        with pytest.raises(DataPrepError, match="cannot be read as a Debian package"):
            members_of(damaged)
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with contextlib.suppress(DataPrepError):  # else the damage is where nothing is read
            assert members_of(damaged) == read


def test_control_data_without_a_version(tmp_path):
    control = COMPRESSORS[".xz"](tar_of({"control": b"Package: x\n\xff\n"}))
    path = write_ar(tmp_path / "a.deb", [("control.tar.xz", control)])
    with pytest.raises(DataPrepError, match="state no version"):
        package_version(path)


@needs_zstd
def test_zstd_packages_need_its_program(tmp_path, monkeypatch):
    path = write_deb(tmp_path / "a.deb", {"a": b""}, suffix=".zst")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataPrepError, match="Install zstd, or name a folder with Debian's"):
        members_of(path)


def test_packages_need_python_debian(tmp_path, monkeypatch):
    path = write_deb(tmp_path / "a.deb", {"a": b""})
    monkeypatch.setitem(sys.modules, "debian.arfile", None)
    with pytest.raises(DataPrepError, match="python-debian, which reads packages, is not"):
        members_of(path)


def deb_name(package, version=VERSION):
    return f"{package}_{version.replace(':', '%3a')}_all.deb"


def write_both(folder, versions=(VERSION, VERSION)):
    for package, version in zip((DE, EN), versions, strict=True):
        write_deb(folder / deb_name(package, version), {"a": b""}, version)
    return folder


def test_packages_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # whatever were run would not be found
    folder = write_both(tmp_path / "folder")
    write_deb(folder / "libreoffice-help-de-extra_1_all.deb", {"a": b""})
    paths = obtain_packages([DE, EN], tmp_path / "cache", folder)
    assert paths == {package: folder / deb_name(package) for package in (DE, EN)}
    assert not (tmp_path / "cache").exists()


def test_a_folder_without_the_packages(tmp_path):
    folder = write_both(tmp_path / "folder")
    write_deb(folder / f"{EN}_1_all.deb", {"a": b""})
    with pytest.raises(DataPrepError, match=rf"holds 2 files of {EN}: .*Leave only one"):
        obtain_packages([DE, EN], tmp_path, folder)
    (folder / deb_name(DE)).unlink()
    with pytest.raises(DataPrepError, match=rf"holds no {DE}_VERSION.*packages.debian.org"):
        obtain_packages([DE, EN], tmp_path, folder)


def test_versions_must_fit_together(tmp_path):
    ubuntu = write_both(tmp_path / "ubuntu", ("1:7.4.7-0ubuntu1", VERSION))
    assert len(obtain_packages([DE, EN], tmp_path, ubuntu)) == 2
    odd = write_both(tmp_path / "odd", ("not Debian's", "not Debian's"))
    assert len(obtain_packages([DE, EN], tmp_path, odd)) == 2
    mixed = write_both(tmp_path / "mixed", ("4:25.2.3-2", VERSION))
    with pytest.raises(DataPrepError) as caught:
        obtain_packages([DE, EN], tmp_path, mixed)
    for shown in (f"{DE} 4:25.2.3-2", f"{EN} {VERSION}", str(mixed)):
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


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


def test_packages_are_fetched_once(tmp_path, apt_get):
    archive, cache = write_both(tmp_path / "archive"), tmp_path / "cache"
    apt_get(f'shift; for name; do cp {archive}/"$name"_* .; done; echo "W: as root" >&2')
    paths = obtain_packages([DE, EN], cache)
    assert paths == {package: cache / deb_name(package) for package in (DE, EN)}
    assert obtain_packages([DE, EN], cache) == paths
    assert calls(tmp_path) == [f"download {DE} {EN}"]
    paths[EN].unlink()
    assert obtain_packages([DE, EN], cache) == paths
    assert calls(tmp_path)[1:] == [f"download {EN}"]
    assert sorted(cache.iterdir()) == sorted(paths.values())


def test_what_apt_get_complains_of_is_said(tmp_path, apt_get):
    complaints = "echo 'E: Unable to locate package' >&2; echo 'W: as root' >&2"
    apt_get(f"touch {deb_name(DE)}; {complaints}; exit 100")
    cache = tmp_path / "cache"
    with pytest.raises(DataPrepError, match=r"E: Unable to locate package\. Run `apt-get update`"):
        obtain_packages([DE, EN], cache)
    assert list(cache.iterdir()) == []


def test_without_apt_get(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = rf"no apt-get .*fetch {DE} and {EN} from packages.debian.org .*--mirror"
    with pytest.raises(DataPrepError, match=expected):
        obtain_packages([DE, EN], tmp_path / "cache")
