"""`fairseq-gradinit doctor`: what it finds here, and in environments where something is wrong."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from conftest import PLUGIN, ROOT

from fairseq_gradinit.cli import command, doctor


def texts(level: str) -> list[str]:
    return [finding.text for finding in doctor.findings() if finding.level == level]


def test_here_it_works(capsys):
    assert command.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"ok      torch {torch.__version__}, built without CUDA" in lines or torch.version.cuda
    assert f"ok      the plugin loads: {' '.join(PLUGIN)}" in lines
    assert {line[:8].strip() for line in lines} <= {"ok", "note"}


def test_a_missing_fairseq_is_a_problem(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(doctor.importlib, "import_module", missing)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor.print_findings(Namespace()) == 1
    printed = capsys.readouterr().out
    assert "problem fairseq is not installed: run `pip install 'fairseq-grad" in printed
    assert "problem the plugin cannot be loaded: " in printed
    assert "note    matplotlib is missing, which pictures need: `pip install " in printed


def test_an_old_python_is_a_problem(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 8, 1))
    assert texts("problem") == ["Python 3.8.1: fairseq's builds are for 3.11 or 3.12"]


def test_an_old_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    assert texts("problem") == ["torch 2.5.1+cu121: 2.6 or newer is needed"]


def test_two_fairseqs_are_a_problem(monkeypatch):
    def version(name):
        if name in ("fairseq", "ve-fairseq"):
            return "0.12.2"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    (problem,) = texts("problem")
    assert problem.startswith("ve-fairseq and fairseq are both installed, and share files")


def test_a_fairseq_that_breaks_is_a_problem(monkeypatch):
    found = importlib.import_module

    def broken(name):
        if name == "fairseq":
            raise AttributeError("module 'numpy' has no attribute 'float'")
        return found(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    expected = "fairseq cannot be imported: AttributeError: module 'numpy' has no attribute 'float'"
    assert texts("problem") == [expected]
    assert command.main(["doctor"]) == 1


def test_another_fairseq_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "fairseq_distribution", lambda: ("fairseq", "0.12.2"))
    assert "fairseq 0.12.2 is untested here; ve-fairseq 0.12.3 is tested" in texts("note")
    assert not any(text.startswith("ve-fairseq:") for text in texts("note"))


def test_beside_a_fairseq_that_runs_from_a_clone_the_user_dir_is_a_path(monkeypatch, tmp_path):
    clone = SimpleNamespace(origin=str(tmp_path / "fairseq" / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: clone)
    assert f"the plugin loads: --user-dir {ROOT / 'fairseq_gradinit'}" in texts("ok")
    (tmp_path / "fairseq_gradinit").mkdir()
    assert "the plugin loads: --user-dir fairseq_gradinit" in texts("ok")


@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_without_a_gpu_there_is_a_note(monkeypatch, cuda):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (note,) = (text for text in texts("note") if text.startswith("no GPU"))
    assert ("torch sees no driver" in note) == (cuda is not None)


def test_gpus_are_named(monkeypatch):
    card = SimpleNamespace(name="a card", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    expected = [f"GPU {i}: a card, 80 GiB, capability 9.0" for i in range(2)]
    assert [text for text in texts("ok") if text.startswith("GPU")] == expected
