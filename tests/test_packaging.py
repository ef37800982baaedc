"""The package: what imports without fairseq, and `--user-dir` after a plain installation."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fairseq_gradinit

SOURCE_FILES = (
    *("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "SECURITY.md"),
    *("constraints.txt", "pyproject.toml", "setup.py"),
)

PACKAGES = ("fairseq_gradinit", "hydra_plugins")

NO_FAIRSEQ = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fairseq":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=120,
        check=False,
    )


def test_a_missing_fairseq_is_answered_with_what_to_install():
    done = python(NO_FAIRSEQ + "import fairseq_gradinit.plugin.install")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: fairseq is not installed: run `pip install "
        "'fairseq-gradinit[fairseq]'`, which brings one that fits this Python"
    )


@pytest.mark.slow
def test_the_engine_needs_no_fairseq():
    code = NO_FAIRSEQ + (
        "import fairseq_gradinit.engine.learner, fairseq_gradinit.engine.centering\n"
        "import fairseq_gradinit.scales.file, fairseq_gradinit.initialization\n"
        "print(sorted(name for name in sys.modules if name.startswith(('fairseq.', 'hydra'))))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist and the wheel, by what `python -m build` calls, of a copy of the source."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in SOURCE_FILES:
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    code = (
        "import sys, setuptools.build_meta as backend\n"
        "folder = sys.argv[1]\n"  # setuptools changes the arguments
        "backend.build_sdist(folder), backend.build_wheel(folder)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        cwd=source,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_sdist_and_wheel_hold_what_they_should_and_serve_as_a_user_dir(built, tmp_path):
    """In a folder such as site-packages, with a fairseq and a plain installation of the wheel."""
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for name in ("fairseq", "fairseq_cli"):
        stock = find_spec(name).submodule_search_locations[0]
        shutil.copytree(stock, tmp_path / name, copy_function=os.symlink)
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert modules == {
        str(path.relative_to(ROOT))
        for folder in PACKAGES
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix != ".pyc"
    }
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive if member.isfile()}
    others = {name for name in inside if not name.startswith((*PACKAGES, "fairseq_gradinit.egg"))}
    assert others == {*SOURCE_FILES, "PKG-INFO", "setup.cfg"}
    assert modules <= inside
    (info,) = tmp_path.glob("*.dist-info")
    text = (info / "METADATA").read_text()
    assert f"\nVersion: {fairseq_gradinit.__version__}\n" in text
    assert "\nLicense-Expression: MIT\n" in text
    assert "\nProvides-Extra: fairseq\n" in text
    assert not any(line.startswith("Requires-Dist: fairseq") for line in text.splitlines())
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    code = (
        "import sys; from fairseq_cli.train import cli_main\n"
        "sys.argv = ['fairseq-train', '--user-dir', 'fairseq_gradinit', '--help']\n"
        "try: cli_main()\n"
        "except SystemExit: pass\n"
        "import fairseq_gradinit; print('FROM', fairseq_gradinit.__file__)"
    )
    done = python(code, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "--gradinit-iterations" in done.stdout
    found = Path(done.stdout.rpartition("FROM ")[2].strip())
    assert found.resolve() == tmp_path / "fairseq_gradinit" / "__init__.py"


@pytest.mark.parametrize(
    ("installed_name", "brings_one"),
    [(None, True), ("ve-fairseq", True), ("fairseq", False), ("fairseq-fixed", False)],
)
def test_the_extra_never_replaces_a_fairseq_that_is_there(installed_name, brings_one, tmp_path):
    if installed_name:
        (tmp_path / "fairseq").mkdir()
        info = tmp_path / f"{installed_name.replace('-', '_')}-0.12.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {installed_name}\nVersion: 0.12.3\n")
    with mock.patch("sysconfig.get_path", return_value=str(tmp_path)):
        extra = extras()["fairseq"]
    assert [requirement.split(">")[0] for requirement in extra] == ["ve-fairseq"] * brings_one


def extras() -> dict[str, list[str]]:
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs["extras_require"]


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
