"""The package: what imports without fairseq, and `--user-dir` after a plain installation."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SOURCE_FILES = (
    *("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "SECURITY.md"),
    *("constraints.txt", "setup.py"),
)

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
    done = python(NO_FAIRSEQ + "import fairseq_gradinit.plugin")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: fairseq is not installed: run `pip install "
        "'fairseq-gradinit[fairseq]'`, which brings one that fits this Python"
    )


def test_the_engine_needs_no_fairseq():
    code = NO_FAIRSEQ + (
        "import fairseq_gradinit.engine, fairseq_gradinit.quiet, fairseq_gradinit.scales\n"
        "import fairseq_gradinit.centering\n"
        "print(sorted(name for name in sys.modules if name.startswith(('fairseq.', 'hydra'))))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def source_in(folder: Path) -> Path:
    """What is needed to build the package, copied."""
    source = folder / "source"
    source.mkdir()
    for name in (*SOURCE_FILES, "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("fairseq_gradinit", "hydra_plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder such as site-packages, with a fairseq and a plain installation of the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    source = source_in(folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    site = folder / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name in ("fairseq", "fairseq_cli"):
        stock = Path(find_spec(name).submodule_search_locations[0])
        shutil.copytree(stock, site / name, ignore=shutil.ignore_patterns("*.so.*", "*.txt"))
    return site


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    (metadata,) = installed.glob("*.dist-info")
    names = {path.name for path in installed.iterdir()}
    assert names == {"fairseq_gradinit", "hydra_plugins", "fairseq", "fairseq_cli", metadata.name}
    modules = {path.name for path in (ROOT / "fairseq_gradinit").glob("*.py")}
    assert {path.name for path in (installed / "fairseq_gradinit").glob("*.py")} == modules
    text = (metadata / "METADATA").read_text()
    assert "Provides-Extra: fairseq" in text
    assert "\nLicense: MIT\n" in text
    assert (metadata / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert not any(line.startswith("Requires-Dist: fairseq") for line in text.splitlines())


def test_user_dir_after_a_plain_installation(installed):
    code = (
        "import sys; from fairseq_cli.train import cli_main; import fairseq_cli\n"
        "sys.argv = ['fairseq-train', '--user-dir', 'fairseq_gradinit', '--help']\n"
        "try: cli_main()\n"
        "except SystemExit: pass\n"
        "import fairseq_gradinit; print('FROM', fairseq_gradinit.__file__)"
    )
    done = python(code, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "--gradinit-iterations" in done.stdout
    found = Path(done.stdout.rpartition("FROM ")[2].strip())
    assert found.resolve() == installed / "fairseq_gradinit" / "__init__.py"


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
    with (
        mock.patch("setuptools.setup") as setup,
        mock.patch("sysconfig.get_path", return_value=str(tmp_path)),
    ):
        runpy.run_path(str(ROOT / "setup.py"))
    extra = setup.call_args.kwargs["extras_require"]["fairseq"]
    assert [requirement.split(">")[0] for requirement in extra] == ["ve-fairseq"] * brings_one


def build(source: Path, folder: Path) -> tuple[Path, Path]:
    """The sdist and the wheel, by what `python -m build` calls, at a time that is given."""
    folder.mkdir()
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
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_two_builds_at_two_times_are_the_same_bytes_and_hold_what_they_should(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = build(source_in(tmp_path / "a"), tmp_path / "first")
    later = source_in(tmp_path / "b")
    for path in later.rglob("*"):
        os.utime(path, (time.time() + 9e4,) * 2)
    second = build(later, tmp_path / "second")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    with tarfile.open(first[0]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()} - {""}
        assert {(member.uname, member.mtime) for member in archive} == {("", 1700000000)}
    with zipfile.ZipFile(first[1]) as archive:
        modules = {name for name in archive.namelist() if ".dist-info/" not in name}
    folders = ("fairseq_gradinit", "hydra_plugins")
    assert modules == {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix != ".pyc"
    }
    others = {
        name for name in inside if not name.startswith((*folders, "fairseq_gradinit.egg-info"))
    }
    assert others == {*SOURCE_FILES, "PKG-INFO", "pyproject.toml", "setup.cfg"}
    assert modules <= inside


def requirements() -> dict[str, Requirement]:
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    arguments = setup.call_args.kwargs
    lists = [arguments["install_requires"], *arguments["extras_require"].values()]
    return {canonicalize_name(r.name): r for texts in lists for r in map(Requirement, texts)}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_dependency_is_bounded_on_both_sides_around_the_tested_version():
    for name, requirement in requirements().items():
        assert {s.operator for s in requirement.specifier} == {">=", "<"}, name
        assert requirement.specifier.contains(pinned()[name]), name


def listed_licences() -> dict[str, tuple[str, str]]:
    """Version and licence of each package, as docs/licences.md has them."""
    text = (ROOT / "docs" / "licences.md").read_text()
    rows = re.findall(r"^\| (\S+) +\| (\S+) +\| ([^|]+?) +\|$", text, re.MULTILINE)
    return {
        canonicalize_name(name): (version.partition("+")[0], licence)
        for name, version, licence in rows
        if name != "Name"
    }


def test_the_licences_are_those_of_the_pinned_versions():
    found = {name: version for name, (version, _) in listed_licences().items()}
    assert found == pinned()


def stated_licences(name: str) -> set[str]:
    """What the metadata of an installed package call its licence, in each of their ways."""
    metadata = importlib.metadata.metadata(name)
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in metadata.get_all("Classifier", [])
        if text.startswith("License :: ")
    ]
    # Some have the whole text there.
    line = (metadata.get("License") or "").partition("\n")[0]
    return {metadata.get("License-Expression") or "", "; ".join(classifiers), line} - {""}


def test_the_licences_are_what_the_packages_say():
    listed = listed_licences()
    installed = {
        canonicalize_name(found.name): found.version.partition("+")[0]
        for found in importlib.metadata.distributions()
    }
    checked = [name for name, version in pinned().items() if installed.get(name) == version]
    assert checked
    for name in checked:
        assert listed[name][1] in stated_licences(name), name
    # What the page says of copyleft; the MPL's holds for the files that it is in alone.
    assert [name for name, (_, licence) in listed.items() if "GPL" in licence] == ["python-debian"]


def test_the_changelog_names_the_version():
    from fairseq_gradinit import __version__

    assert re.search(
        rf"^(## \[)?{re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
