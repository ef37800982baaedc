"""The documentation: the site, its links there and in the repository, and what it says of code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

import fairseq
import fairseq_cli
import pytest
from conftest import ROOT
from lxml import html

from fairseq_gradinit.plugin import rate_advice
from fairseq_gradinit.plugin.options import PRESETS, GradInitOptions
from fairseq_gradinit.plugin.schemes.options import SchemeOptions

# All that has pages, or files that they link to.
FOLDERS = ("benchmarks", "data-prep", "docs", "fairseq_gradinit", "recipes")
PAGES = sorted([*ROOT.glob("*.md"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md"))])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """What `make docs` makes; it ends with an error on a link or an anchor that leads nowhere."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def html_pages(site: Path) -> dict[Path, html.HtmlElement]:
    return {path: html.parse(str(path)).getroot() for path in site.rglob("*.html")}


def html_of(page: Path) -> str:
    return str(page.relative_to(ROOT).with_suffix(".html")).replace("README", "index")


@pytest.mark.slow
def test_every_page_of_the_repository_is_in_the_site(site):
    assert ROOT / "README.md" in PAGES
    assert [page for page in PAGES if not (site / html_of(page)).is_file()] == []


@pytest.mark.slow
def test_the_site_loads_nothing_from_other_hosts(site):
    loaded = []
    for path, page in html_pages(site).items():
        for element, _, link, _ in page.iterlinks():
            if element.tag not in {"a", "form"}:
                loaded.append((path, link))
    for path in site.rglob("*.css"):
        style = path.read_text()
        loaded += [(path, link) for link in re.findall(r"url\([\"']?([^\"')]+)", style)]
        assert "@import" not in style
    assert {Path(urlsplit(link).path).suffix for _, link in loaded} >= {".css", ".js", ".woff2"}
    assert [load for load in loaded if urlsplit(load[1]).netloc] == []


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere_in_it(site):
    pages = html_pages(site)
    ids = {path: {*page.xpath("//@id"), *page.xpath("//a/@name")} for path, page in pages.items()}
    count = 0
    for path, page in pages.items():
        # It answers requests for anything, so its links begin at the root of the server.
        if path.name == "404.html":
            continue
        for _, _, link, _ in page.iterlinks():
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            assert target.is_file(), (path, link)
            assert target.is_relative_to(site.resolve()), (path, link)
            if target in ids and address.fragment:
                assert address.fragment in ids[target], (path, link)
            count += 1
    assert count > 500


def without_code(markdown: str) -> str:
    blocks = re.sub(r"^```.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "", re.sub(r"^ {4}.*$", "", blocks, flags=re.MULTILINE))


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Path and anchor of each link to something in the repository."""
    for link in re.findall(r"\]\(\s*([^)\s]+)", without_code(page.read_text())):
        address = urlsplit(link)
        if not address.scheme:
            yield unquote(address.path), address.fragment


def anchors(page: Path) -> set[str]:
    """Those that a code-hosting page makes of the headings, where no two are alike."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_hold_in_the_repository_too(page):
    for path, anchor in links(page):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert target.resolve().is_relative_to(ROOT), path
        assert not anchor or anchor in anchors(target), (path, anchor)


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, str]]:
    """Flag to the rows under its heading, and its help text."""
    with mock.patch.object(sys, "path", [str(ROOT / "docs"), *sys.path]):
        from options_page import options_page
    found = {}
    for section in re.split(r"^### ", options_page(), flags=re.MULTILINE)[1:]:
        flag, text, rest = section.split("\n\n", 2)
        rows = re.findall(r"^- (.+?): (.+)$", rest.replace("`", ""), re.MULTILINE)
        found[flag] = {**dict(rows), "help": text}
    return found


def test_the_reference_has_every_option_with_its_name_under_hydra_and_help(reference):
    found = reference
    every = [option for kind in (GradInitOptions, SchemeOptions) for option in fields(kind)]
    names = [option.name for option in every if option.name != "_name"]
    assert list(found) == ["--" + name.replace("_", "-") for name in names]
    assert [row["Hydra name"] for row in found.values()] == [f"task.{name}" for name in names]
    for option, row in zip((o for o in every if o.name != "_name"), found.values(), strict=True):
        assert option.metadata["help"].startswith(row["help"])
    assert found["--gradinit-norm-gains"]["value"] == "fixed, learned"
    assert found["--gradinit-iterations"]["value"] == "a whole number"


def test_the_reference_has_the_defaults_of_the_presets(reference):
    for flag, row in reference.items():
        name = flag.lstrip("-").replace("-", "_")
        attribute = name.removeprefix("gradinit_")
        if hasattr(PRESETS["default"], attribute):
            default, paper = (getattr(PRESETS[kind], attribute) for kind in ("default", "paper"))
            if default is None:
                assert "the run's" in row["default"], flag
            else:
                assert row["default"] == str(default), flag
            assert row["preset paper"] == str(paper), flag
            continue
        assert "preset paper" not in row
        default = getattr(GradInitOptions if "gradinit" in name else SchemeOptions, name)
        assert row["default"] == {"False": "off", "None": "none"}.get(str(default), str(default))


def messages(paths: Iterable[Path]) -> list[str]:
    """The texts in these programs, with three dots for what is filled in when they run."""
    found = []
    for path in paths:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[.\d]*[sdfg]|\{[^{}]*\}", "...", node.value))
    return found


def test_the_messages_in_troubleshooting_are_those_of_the_code():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^ *> `(.+)`$", text, re.MULTILINE)
    assert len(quoted) == len(re.findall(r"^ *> .", text, re.MULTILINE)) > 20
    ours = messages((ROOT / "fairseq_gradinit").rglob("*.py"))
    installed = Path(fairseq.__file__).parent
    program = Path(fairseq_cli.__file__).parent / "train.py"
    others = ("*.py", "distributed/utils.py", "optim/*.py")
    theirs = messages([program, *(path for name in others for path in installed.glob(name))])
    for quote in quoted:
        message = quote.removeprefix("...").removesuffix("...")
        assert any(message in known for known in (*ours, *theirs)), quote


def test_troubleshooting_has_the_numbers_of_the_rate_advice():
    text = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    assert f"From {rate_advice.HELD:g} on the log has a warning" in text
    assert f"{100 * rate_advice.SHORT:g} % of training" in text
    assert f"up to {200 * rate_advice.SHORT:g} % of training" in text
    assert f"from a factor of {rate_advice.FAR:g} on" in text
