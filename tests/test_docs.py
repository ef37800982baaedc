"""The documentation: the site, and what pages say of code."""

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
from urllib.parse import urlsplit

import fairseq
import fairseq_cli
import pytest
import torch
from conftest import ROOT
from lxml import html

from fairseq_gradinit.plugin import rate_advice
from fairseq_gradinit.plugin.options import OPTION_NAMES, PRESETS, GradInitOptions
from fairseq_gradinit.plugin.schemes.options import SchemeOptions


@pytest.mark.slow
def test_the_site_has_no_dead_link_and_loads_nothing_from_other_hosts(tmp_path):
    """`make docs` ends with an error on a link or an anchor that leads nowhere."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stderr
    loaded = []
    for path in tmp_path.rglob("*.html"):
        links = html.parse(str(path)).getroot().iterlinks()
        loaded += [link for element, _, link, _ in links if element.tag not in {"a", "form"}]
    for path in tmp_path.rglob("*.css"):
        loaded += re.findall(r"url\([\"']?([^\"')]+)", path.read_text())
    assert {Path(urlsplit(link).path).suffix for link in loaded} >= {".css", ".js", ".woff2"}
    assert [link for link in loaded if urlsplit(link).netloc] == []


def test_the_reference_has_every_option_with_its_hydra_name_help_and_defaults():
    with mock.patch.object(sys, "path", [str(ROOT / "docs"), *sys.path]):
        from options_page import options_page
    sections = re.split(r"^### ", options_page(), flags=re.MULTILINE)[1:]
    options = [o for kind in (GradInitOptions, SchemeOptions) for o in fields(kind)[1:]]
    for option, section in zip(options, sections, strict=True):
        flag, text, rest = section.split("\n\n", 2)
        row = dict(re.findall(r"^- (.+?): (.+)$", rest.replace("`", ""), re.MULTILINE))
        assert flag == "--" + option.name.replace("_", "-")
        assert row["Hydra name"] == f"task.{option.name}"
        assert option.metadata["help"].startswith(text)
        attribute = option.name.removeprefix("gradinit_")
        if hasattr(PRESETS["default"], attribute):
            default, paper = (getattr(PRESETS[kind], attribute) for kind in ("default", "paper"))
            assert ("the run's" if default is None else str(default)) in row["default"]
            assert row["preset paper"] == str(paper)
        else:
            default = {False: "off", None: "none"}.get(option.default, str(option.default))
            assert row["default"] == default


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
    assert quoted
    installed = Path(fairseq.__file__).parent
    theirs = [Path(fairseq_cli.__file__).parent / "train.py"]
    for pattern in ("*.py", "distributed/utils.py", "optim/*.py"):
        theirs += installed.glob(pattern)
    known = messages([*(ROOT / "fairseq_gradinit").rglob("*.py"), *theirs])
    for quote in quoted:
        message = quote.removeprefix("...").removesuffix("...")
        assert any(message in text for text in known), quote


def test_troubleshooting_has_the_numbers_of_the_rate_advice():
    text = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    assert f"From {rate_advice.HELD:g} on the log has a warning" in text
    assert f"{100 * rate_advice.SHORT:g} % of training" in text
    assert f"up to {200 * rate_advice.SHORT:g} % of training" in text
    assert f"from a factor of {rate_advice.FAR:g} on" in text


# ---- The README.

README = (ROOT / "README.md").read_text()


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    return {"False": "off", "None": ""}.get(str(value), str(value))


def test_defaults_of_the_six_options_are_those_of_the_presets():
    default, paper = PRESETS["default"], PRESETS["paper"]
    rows = re.findall(r"^\| `--(gradinit\S*)` \|(.*?)\|(.*?)\|", README, re.MULTILINE)
    assert len(rows) == 6
    for flag, *cells in rows:
        option = flag.replace("-", "_")
        assert option in OPTION_NAMES
        name, cells = option.removeprefix("gradinit_"), [cell.strip() for cell in cells]
        if name == "max_tokens":
            growth = f"{default.batch_per_training_batch:g} times `--max-tokens`"
            assert cells == [growth, shown(paper.max_tokens)]
        elif hasattr(default, name):
            assert cells == [shown(getattr(default, name)), shown(getattr(paper, name))], flag
        else:
            assert cells[0] == shown(getattr(GradInitOptions, option)), flag


def test_the_example_runs_and_lowers_the_trial_loss():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(code, names)
    trial = [iteration.trial_loss for iteration in names["result"].history]
    assert sum(trial[-10:]) < 0.9 * sum(trial[:10])
    for name, parameter in names["net"].named_parameters():
        # torch draws them from [-1/4, 1/4].
        assert parameter.abs().max() <= names["result"].scales[name] / 4 + 1e-6
        assert names["result"].scales[name] != 1.0, name
