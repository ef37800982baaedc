"""The documentation: the site, its links there and in the repository, and what it says of code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable
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


@pytest.mark.slow
def test_the_site_has_every_page_and_loads_nothing_from_other_hosts(tmp_path):
    """`make docs` ends with an error on a link or an anchor that leads nowhere."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert ROOT / "README.md" in PAGES
    for page in PAGES:
        name = str(page.relative_to(ROOT).with_suffix(".html")).replace("README", "index")
        assert (tmp_path / name).is_file(), page
    loaded = []
    for path in tmp_path.rglob("*.html"):
        for element, _, link, _ in html.parse(str(path)).getroot().iterlinks():
            address = urlsplit(link)
            if element.tag not in {"a", "form"}:
                loaded.append(link)
            # 404.html answers requests for anything: its links begin at the root of the server.
            if not address.scheme and not address.netloc and address.path and path.stem != "404":
                target = (path.parent / unquote(address.path)).resolve()
                assert target.is_file(), (path, link)
                assert target.is_relative_to(tmp_path.resolve()), (path, link)
    for path in tmp_path.rglob("*.css"):
        style = path.read_text()
        loaded += re.findall(r"url\([\"']?([^\"')]+)", style)
        assert "@import" not in style
    assert {Path(urlsplit(link).path).suffix for link in loaded} >= {".css", ".js", ".woff2"}
    assert [link for link in loaded if urlsplit(link).netloc] == []


FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Those that a code-hosting page makes of the headings, where no two are alike."""
    headings = re.findall(r"^#{1,6} (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_hold_in_the_repository_too(page):
    text = re.sub(r"^ {4}.*$", "", FENCED.sub("", page.read_text()), flags=re.MULTILINE)
    for link in re.findall(r"\]\(\s*([^)\s]+)", re.sub(r"`[^`]*`", "", text)):
        address = urlsplit(link)
        if not address.scheme:
            target = page.parent / unquote(address.path) if address.path else page
            assert target.exists(), link
            assert target.resolve().is_relative_to(ROOT), link
            assert not address.fragment or address.fragment in anchors(target), link


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


def test_the_reference_has_every_option_with_its_hydra_name_help_and_defaults(reference):
    every = [o for kind in (GradInitOptions, SchemeOptions) for o in fields(kind)]
    every = [option for option in every if option.name != "_name"]
    assert list(reference) == ["--" + option.name.replace("_", "-") for option in every]
    for option, row in zip(every, reference.values(), strict=True):
        assert row["Hydra name"] == f"task.{option.name}"
        assert option.metadata["help"].startswith(row["help"])
        attribute = option.name.removeprefix("gradinit_")
        if hasattr(PRESETS["default"], attribute):
            default, paper = (getattr(PRESETS[kind], attribute) for kind in ("default", "paper"))
            shown = "the run's" if default is None else str(default)
            assert row["default"] == shown or (default is None and shown in row["default"]), row
            assert row["preset paper"] == str(paper), row
        else:
            assert "preset paper" not in row
            default = {False: "off", None: "none"}.get(option.default, str(option.default))
            assert row["default"] == default
    assert reference["--gradinit-norm-gains"]["value"] == "fixed, learned"
    assert reference["--gradinit-iterations"]["value"] == "a whole number"


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
