"""`fairseq-gradinit doctor`: what it finds here, and in environments where something is wrong."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch
from conftest import PLUGIN, ROOT

from fairseq_gradinit.cli import command, doctor


def texts(level: str) -> list[str]:
    return [text for found, text in doctor.findings() if found == level]


def test_here_it_works(capsys):
    assert command.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"ok      torch {torch.__version__}, built without CUDA" in lines or torch.version.cuda
    assert f"ok      the plugin loads: {' '.join(PLUGIN)}" in lines
    assert {line[:8].strip() for line in lines} <= {"ok", "note"}


def test_a_fairseq_that_breaks_is_a_problem(monkeypatch, capsys):
    def broken(name):
        raise AttributeError("module 'numpy' has no attribute 'float'")

    # The program itself is imported in this way.
    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=broken))
    assert command.main(["doctor"]) == 1
    expected = "fairseq and the plugin: AttributeError: module 'numpy' has no attribute 'float'"
    assert f"problem {expected}" in capsys.readouterr().out


def test_another_fairseq_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "fairseq_distribution", lambda: ("fairseq", "0.12.2"))
    assert "fairseq 0.12.2 is untested here; ve-fairseq 0.12.3 is tested" in texts("note")
    assert not any(text.startswith("ve-fairseq:") for text in texts("note"))


def test_beside_a_fairseq_that_runs_from_a_clone_the_user_dir_is_a_path(monkeypatch, tmp_path):
    clone = SimpleNamespace(origin=str(tmp_path / "fairseq" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: clone)
    assert doctor.user_dir() == str(ROOT / "fairseq_gradinit")
    (tmp_path / "fairseq_gradinit").mkdir()
    assert doctor.user_dir() == "fairseq_gradinit"


def test_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert any(text.startswith("torch sees no GPU") for text in texts("note"))
    card = SimpleNamespace(name="a card", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    expected = [f"GPU {i}: a card, 80 GiB, capability 9.0" for i in range(2)]
    assert [text for text in texts("ok") if text.startswith("GPU")] == expected
