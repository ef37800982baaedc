"""The cost benchmark runs, what it compares does the same, and GradInit's memory is bounded."""

from __future__ import annotations

from pathlib import Path

import cost
import pytest
import torch
from conftest import ROOT
from cost import DIFFERENCES, EXACT, MEMORY_TARGET, MEMORY_TARGETS, OBJECTIVE, STEP
from plain_gradinit import PlainGradInit
from record import read
from workload import Size, batch_pair, loss_of, new_model, peak_memory

from fairseq_gradinit.engine import GradInitConfig, collect_blocks
from fairseq_gradinit.engine.learner import ScaleLearner


def test_the_baseline_learns_what_the_engine_learns() -> None:
    size = Size(1, 8, 16, 2, vocabulary=20, sentences=4, length=6)
    model = new_model(size).double()
    blocks, loss = collect_blocks({"": model}, "fixed"), loss_of(model)
    pairs = [batch_pair(size, seed) for seed in range(12)]
    probe = ScaleLearner(blocks, loss, GradInitConfig(eta=1e-3))
    probe.step(pairs[0])
    gamma = 0.99 * probe.learned().history[0].grad_norm
    probe.weights.restore()
    config = GradInitConfig(eta=1e-3, gamma=gamma, second_order="exact")
    learner = ScaleLearner(blocks, loss, config)
    for pair in pairs:
        learner.step(pair)
    kinds = [iteration.kind for iteration in learner.learned().history]
    learner.weights.restore()
    plain = PlainGradInit(blocks, loss, config)
    for pair in pairs:
        plain.step(pair)
    assert set(kinds) == {"objective", "constraint"}
    assert plain.kinds == kinds
    assert (plain.scales - 1.0).abs().max() > 0.02
    torch.testing.assert_close(plain.scales, learner.weights.scales.detach(), rtol=1e-9, atol=0.0)


def test_peak_memory_counts_what_is_alive_and_is_bounded() -> None:
    """Where parameters and activations both count, as in a model of usual size."""
    size = Size(2, 64, 256, 4, vocabulary=1000, sentences=16, length=16)
    numbers = sum(p.numel() for p in new_model(size).parameters())
    contenders = cost.contenders_for(size)
    peaks = {name: peak_memory(new) for name, new in contenders.items()}
    assert peaks[STEP] == peak_memory(contenders[STEP])
    # Weights, gradients and two moments, and activations on top.
    assert 4 * 4 * numbers < peaks[STEP] < 3 * 4 * 4 * numbers
    for kind in (OBJECTIVE, DIFFERENCES, EXACT):
        assert peaks[kind] <= MEMORY_TARGETS[kind] * peaks[STEP]
    ours = max(peaks[OBJECTIVE], peaks[DIFFERENCES])
    assert ours <= MEMORY_TARGET * max(peaks[cost.PLAIN_OBJECTIVE], peaks[cost.PLAIN_CONSTRAINT])


@pytest.mark.slow
def test_the_three_measurements(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Size(1, 16, 32, 2, vocabulary=50, sentences=4, length=6)
    changes = {"SIZE": tiny, "GROWING_SIZE": tiny, "GPU_SIZE": tiny, "REPETITIONS": 2}
    changes |= {"ITERATIONS": 6, "LAYERS": (1, 2, 3), "WIDTHS": (16, 32), "SENTENCES": (4, 6)}
    for name, value in {**changes, "RESULTS": tmp_path}.items():
        monkeypatch.setattr(cost, name, value)

    def measured(part: str) -> list[list[list[str]]]:
        cost.main([part])
        return [table["rows"] for table in read(tmp_path / f"{part}-cpu.json")["results"]["tables"]]

    iterations, runs = measured("cost")
    assert [row[0] for row in iterations] == list(cost.contenders_for(tiny))
    assert all(float(row[4]) > 0 for row in iterations)
    assert runs[0][0].startswith("faster with finite differences")
    printed = capsys.readouterr().out
    assert "| constraint, finite differences |" in printed
    cost.main(["--table"])
    assert capsys.readouterr().out == printed
    (growth,) = measured("scaling")
    assert len(growth) == 3 * len(cost.GROWING)
    assert growth[1][:2] == ["depth, 2 to 6 layers", OBJECTIVE]
    assert float(growth[1][4].rstrip("%")) < 2
    assert (tmp_path / "scaling-cpu.png").read_bytes().startswith(b"\x89PNG")
    (processes,) = measured("processes")
    assert [row[0] for row in processes] == ["objective", DIFFERENCES]
    titles = [table.title.split(", ")[-2:] for table in cost.measure_on_gpu("cpu")]
    assert titles == [["fp32", "cpu"], ["bf16", "cpu"]]
    assert all(float(cell) > 0 for row in processes for cell in row[1:3])


def test_cost_md_shows_the_kept_results() -> None:
    assert cost.kept_tables() in (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
