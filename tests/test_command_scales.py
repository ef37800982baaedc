"""`fairseq-gradinit diff`: what it says of the scales of two runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_gradinit.cli import command
from fairseq_gradinit.scales.file import BlockScale, Scales

A = Scales(
    (
        BlockScale("fc.weight", (2, 2), 0.5, "learned"),
        BlockScale("fc.bias", (2,), 0.0, "learned"),
        BlockScale("norm.weight", (2,), 1.0, "norm gain"),
    ),
    {"gradinit": "0", "seed": "1", "eta": "0.001"},
)
OTHER_SETTINGS = {"gradinit": "0", "seed": "2", "gamma": "off"}


@pytest.mark.parametrize(
    ("b", "status", "lines"),
    [
        (A, 0, ["0 of 3 tensors differ"]),
        (
            replace(A, settings=OTHER_SETTINGS),
            0,
            [
                "setting seed  1  2",
                "setting eta  0.001  -",
                "setting gamma  -  off",
                "0 of 3 tensors differ",
            ],
        ),
        (
            Scales(
                (
                    BlockScale("fc.weight", (2, 2), 0.75, "learned"),
                    BlockScale("fc.bias", (2,), 0.25, "learned"),
                    BlockScale("new", (), 3.0, "fixed"),
                ),
                A.settings,
            ),
            1,
            [
                "fc.weight  0.5  0.75  ratio 1.5",
                "fc.bias  0  0.25",
                "norm.weight  1 (norm gain)  absent",
                "new  absent  3 (fixed)",
                "4 of 4 tensors differ",
            ],
        ),
    ],
    ids=["equal", "settings", "scales"],
)
def test_differences_are_printed(b, status, lines, tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    A.save(files[0])
    b.save(files[1])
    assert command.main(["diff", *map(str, files)]) == status
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["absent", "a.json"], "cannot read absent"),
        (["a.json", "."], "there is no gradinit_scales.json in ."),
    ],
)
def test_incomparable_arguments_end_with_2(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    A.save(Path("a.json"))
    assert command.main(["diff", *words]) == 2
    assert capsys.readouterr().err.startswith(f"fairseq-gradinit: {sentence}")
