"""The cost benchmark runs, what it compares does the same, and GradInit's memory is bounded."""

from __future__ import annotations

from pathlib import Path

import cost
import pytest
import torch
from cost import (
    DIFFERENCES,
    EXACT,
    MEMORY_TARGET,
    MEMORY_TARGETS,
    OBJECTIVE,
    STEP,
    reaching,
    within,
)
from plain_gradinit import PlainGradInit
from record import Table, markdown, read, write
from torch import nn
from workload import Size, Workload, peak_memory

from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learner import BatchPair, ScaleLearner

ROOT = Path(__file__).resolve().parent.parent


def small_problem():
    """A Transformer layer in float64, its loss, and batches that share half of their rows."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True),
        nn.Linear(8, 3),
    ).double()
    rows = torch.randn(12, 6, 4, 8, dtype=torch.float64)

    def loss(batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        wanted = (batch.sum(2) > 0).long()
        scores = model(batch).flatten(0, 1)
        return nn.functional.cross_entropy(scores, wanted.flatten(), reduction="sum"), 4 * len(
            batch
        )

    pairs = [BatchPair([batch[:4]], [batch[2:]]) for batch in rows]
    return model, loss, pairs


def test_the_baseline_learns_what_the_engine_learns() -> None:
    model, loss, pairs = small_problem()
    with deterministic(model):
        blocks = collect_blocks({"": model}, "fixed")
        probe = ScaleLearner(blocks, loss, GradInitConfig(eta=1e-3))
        probe.step(pairs[0])
        probe.flush()
        probe.restore()
        gamma = 0.99 * probe.history[0].grad_norm
        config = GradInitConfig(eta=1e-3, gamma=gamma, second_order="exact")
        learner = ScaleLearner(blocks, loss, config)
        for pair in pairs:
            learner.step(pair)
        learner.flush()
        learner.restore()
        plain = PlainGradInit(blocks, loss, config)
        for pair in pairs:
            plain.step(pair)
    kinds = [iteration.kind for iteration in learner.history]
    assert set(kinds) == {"objective", "constraint"}
    assert plain.kinds == kinds
    assert (plain.scales - 1.0).abs().max() > 0.02
    torch.testing.assert_close(plain.scales, learner.scales.detach(), rtol=1e-9, atol=0.0)


@pytest.fixture(scope="module")
def small_peaks() -> dict[str, int]:
    """Peak memory, where parameters and activations both count as in a model of usual size."""
    workload = Workload(Size(2, 64, 256, 4, vocabulary=1000, sentences=16, length=16))
    return {n: peak_memory(new, "cpu") for n, new in cost.contenders_for(workload).items()}


@pytest.mark.parametrize("kind", [OBJECTIVE, DIFFERENCES, EXACT])
def test_memory_is_bounded_by_that_of_training(small_peaks: dict[str, int], kind: str) -> None:
    assert small_peaks[kind] <= MEMORY_TARGETS[kind] * small_peaks[STEP]


def test_memory_is_a_fraction_of_the_plain_form(small_peaks: dict[str, int]) -> None:
    ours = max(small_peaks[OBJECTIVE], small_peaks[DIFFERENCES])
    plain = max(small_peaks[cost.PLAIN_OBJECTIVE], small_peaks[cost.PLAIN_CONSTRAINT])
    assert ours <= MEMORY_TARGET * plain


def test_peak_memory_counts_what_is_alive_and_is_the_same_again() -> None:
    workload = Workload(Size(1, 16, 32, 2, vocabulary=50, sentences=4, length=6))
    numbers = sum(p.numel() for p in workload.model().parameters())
    training = cost.contenders_for(workload)[STEP]
    peak = peak_memory(training, "cpu")
    assert peak == peak_memory(training, "cpu")
    # Weights, gradients and two moments, and activations on top.
    assert 4 * 4 * numbers < peak < 4 * 4 * numbers + 200_000


def test_batches_of_a_pair_share_half() -> None:
    pair = Workload(Size(1, 16, 32, 2, vocabulary=5000, sentences=4, length=6)).pair()
    (first,), (second,) = pair.first, pair.second
    assert first.source.shape == second.source.shape == (4, 6)
    assert first.target.shape == (4, 7)
    assert torch.equal(first.source[2:], second.source[:2])
    assert not torch.equal(first.source[:2], second.source[2:])


def measured(part: str, folder: Path) -> list[Table]:
    cost.main([part, "--quick", "--results", str(folder)])
    tables = read(folder / f"{part}-cpu.json")["results"]["tables"]
    return [Table(**table) for table in tables]


@pytest.mark.slow
def test_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iterations, runs = measured("cost", tmp_path)
    assert [row[0] for row in iterations.rows] == list(cost.contenders_for(Workload(cost.TINY)))
    assert all(float(row[4]) > 0 for row in iterations.rows)
    assert [row[0].partition(" (")[0] for row in runs.rows[:2]] == [
        "faster with finite differences",
        "faster with double backward",
    ]
    printed = capsys.readouterr().out
    assert "| constraint, finite differences |" in printed
    cost.main(["--table", "--results", str(tmp_path)])
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    (table,) = measured("scaling", tmp_path)
    assert len(table.rows) == 3 * len(cost.GROWING)
    objective = table.rows[1]
    assert objective[:2] == ["depth, 2 to 6 layers", OBJECTIVE]
    assert float(objective[4].rstrip("%")) < 2
    assert (tmp_path / "scaling-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_processes(tmp_path: Path) -> None:
    (table,) = measured("processes", tmp_path)
    assert [row[0] for row in table.rows] == ["objective", DIFFERENCES]
    assert all(float(cell) > 0 for row in table.rows for cell in row[1:3])


def test_departure_from_a_line() -> None:
    assert cost.departure([1.0, 2.0, 4.0], [3.0, 5.0, 9.0]) == pytest.approx(0.0, abs=1e-12)
    assert cost.departure([0.0, 1.0, 2.0], [0.0, 4.0, 8.0 + 3.0]) == pytest.approx(1.0 / 11.0)


def test_a_record_tells_its_circumstances(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "some.json"
    write(path, {"runs": [{"seed": 1, "curve": [1.0, 2.0]}, {"seed": 2, "curve": []}]})
    record = read(path)
    assert {"git_revision", "git_dirty", "cpu", "cores", "gpu", "numpy", "python"} < set(record)
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["command"].startswith("python ")
    assert [p.name for p in path.parent.iterdir()] == ["some.json"]
    assert '   {"seed": 1, "curve": [1.0, 2.0]},\n' in path.read_text()
    table = Table("T", ["", "x"], [["a", "1"]])
    assert markdown(record, [table]).endswith("|  | x |\n| --- | --- |\n| a | 1 |\n")


def test_a_missed_target_is_called_missed() -> None:
    assert (within(2.2, 2.2), reaching(1.8, 1.8)) == ("2.20", "1.80")
    assert (within(2.21, 2.2), reaching(1.79, 1.8)) == ("2.21, **missed**", "1.79, **missed**")


def test_cost_md_shows_the_kept_results() -> None:
    assert cost.kept_tables(cost.RESULTS) in (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
