"""The package: what imports without fairseq, and `--user-dir` after a plain installation."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from conftest import PLUGIN, ROOT

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder such as site-packages, with a fairseq and a plain installation of the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fairseq_gradinit", "hydra_plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
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
    assert not any(line.startswith("Requires-Dist: fairseq") for line in text.splitlines())


def test_user_dir_after_a_plain_installation(installed):
    code = (
        "import sys; from fairseq_cli.train import cli_main; import fairseq_cli\n"
        f"sys.argv = ['fairseq-train', *{PLUGIN!r}, '--help']\n"
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
