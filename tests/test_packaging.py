"""The package: what imports without fairseq, and `--user-dir` after a plain installation."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import tomllib
import zipfile
from importlib.util import find_spec
from itertools import chain
from unittest import mock

import pytest
from conftest import ROOT, run_command
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fairseq_gradinit

NO_FAIRSEQ = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fairseq":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import fairseq_gradinit.plugin.install
"""


def test_a_missing_fairseq_is_answered_with_what_to_install():
    done = run_command("python", "-c", NO_FAIRSEQ)
    assert done.code == 1
    assert done.output.splitlines()[-1] == (
        "ModuleNotFoundError: fairseq is not installed: run `pip install "
        "'fairseq-gradinit[fairseq]'`, which brings one that fits this Python"
    )


@pytest.mark.slow
def test_the_wheel_holds_all_modules_and_serves_as_a_user_dir(tmp_path):
    """In a folder such as site-packages, beside a fairseq."""
    source, site = tmp_path / "source", tmp_path / "site"
    packages = ("fairseq_gradinit", "hydra_plugins")
    for name in packages:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    expected = {path.relative_to(source) for path in source.glob("*/**/*.*")}
    build = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    done = run_command("python", "-c", build, cwd=source)
    assert done.code == 0, done.output
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert {path.relative_to(site) for name in packages for path in (site / name).rglob("*.*")} == (
        expected
    )
    (metadata,) = site.glob("*.dist-info/METADATA")
    assert f"\nVersion: {fairseq_gradinit.__version__}\n" in metadata.read_text()
    assert "\nRequires-Dist: fairseq" not in metadata.read_text()
    for name in ("fairseq", "fairseq_cli"):
        stock = find_spec(name).submodule_search_locations[0]
        shutil.copytree(stock, site / name, copy_function=os.symlink)
    code = (
        "import sys; from fairseq_cli.train import cli_main\n"
        "sys.argv = ['fairseq-train', '--user-dir', 'fairseq_gradinit', '--help']\n"
        "cli_main()"
    )
    done = run_command("python", "-c", code, PYTHONPATH=str(site))
    assert done.code == 0, done.output
    assert "--gradinit-iterations" in done.output


def extras() -> dict[str, list[str]]:
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs["extras_require"]


@pytest.mark.parametrize(("name", "brings_one"), [("ve-fairseq", True), ("fairseq-fixed", False)])
def test_the_extra_never_replaces_a_fairseq_that_is_there(name, brings_one, tmp_path):
    info = tmp_path / f"{name.replace('-', '_')}-0.12.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: 0.12.3\n")
    with mock.patch("sysconfig.get_path", return_value=str(tmp_path)):
        assert bool(extras()["fairseq"]) == brings_one


def test_every_dependency_is_bounded_around_the_tested_version_and_the_changelog_has_ours():
    version = re.escape(fairseq_gradinit.__version__)
    assert re.search(rf"^(## \[)?{version}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, version in pairs}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, chain(project["dependencies"], *extras().values())):
        assert {s.operator for s in requirement.specifier} == {">=", "<"}, requirement
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
