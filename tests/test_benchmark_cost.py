"""The cost benchmarks run, what they compare does the same, and GradInit's memory is bounded."""

from __future__ import annotations

from pathlib import Path

import accuracy
import cost
import processes_efficiency
import pytest
import scaling
import torch
from cost import DIFFERENCES, EXACT, MEMORY_TARGET, MEMORY_TARGETS, OBJECTIVE, STEP
from plain_gradinit import PlainGradInit
from record import markdown, reaching, read, within, write
from torch import nn
from workload import Size, Workload, peak_memory

from fairseq_gradinit.blocks import collect_blocks
from fairseq_gradinit.config import GradInitConfig
from fairseq_gradinit.engine import BatchPair, ScaleLearner
from fairseq_gradinit.quiet import quiet

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
    with quiet(model):
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


def test_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost.main(["--quick", "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    record = read(tmp_path / "cost-cpu.json")
    (costs,) = record["results"]["costs"]
    assert list(costs["by_contender"]) == list(cost.contenders_for(Workload(Size(1, *[2] * 6))))
    for measured in costs["by_contender"].values():
        seconds = measured["seconds"]
        assert 0.0 < seconds["lowest"] <= seconds["median"] <= seconds["highest"]
        assert measured["bytes"] > 0
    runs = costs["runs"]
    assert len(runs["plain"]["kinds"]) == len(runs["differences"]["kinds"]) == 6
    assert runs["plain"]["kinds"] == runs["exact"]["kinds"]
    assert "| constraint, finite differences |" in printed
    assert "| share of 100k updates: 780 x constraint" in printed
    cost.main(["--table", "--results", str(tmp_path)])
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit):
        cost.main(["--quick", "--only", "d=17", "--results", str(tmp_path)])
    assert "--only d=17: the sizes are 1+1 layers, d=16, " in capsys.readouterr().err


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--quick", "--results", str(tmp_path)])
    lines = read(tmp_path / "scaling-cpu.json")["results"]["lines"]
    assert {(line["axis"], line["contender"]) for line in lines} == {
        (axis, name) for axis in ("depth", "width", "batch") for name in scaling.CONTENDERS
    }
    depth = next(line for line in lines if line["contender"] == OBJECTIVE)
    assert depth["positions"] == [2.0, 4.0, 6.0]
    assert scaling.departure(depth["positions"], depth["bytes"]) < 0.02
    assert (tmp_path / "scaling-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "| depth, 2 to 6 layers | objective iteration |" in capsys.readouterr().out


def test_departure_from_a_line() -> None:
    assert scaling.departure([1.0, 2.0, 4.0], [3.0, 5.0, 9.0]) == pytest.approx(0.0, abs=1e-12)
    assert scaling.departure([0.0, 1.0, 2.0], [0.0, 4.0, 8.0 + 3.0]) == pytest.approx(1.0 / 11.0)


def test_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processes_efficiency.main(["--quick", "--results", str(tmp_path)])
    times = read(tmp_path / "processes-cpu.json")["results"]["times"]
    assert [t["kind"] for t in times] == ["objective", "constraint, finite differences"]
    assert all(t[name] > 0.0 for t in times for name in ("alone", "unconnected", "together"))
    assert "| objective |" in capsys.readouterr().out


def test_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy.main(["--quick", "--results", str(tmp_path)])
    results = read(tmp_path / "accuracy-cpu.json")["results"]
    derivatives = {
        (d["activation"], d["second_order"], d["precision"]): d for d in results["derivatives"]
    }
    assert len(derivatives) == 2 * len(accuracy.WAYS)
    # What is smooth has one derivative, whichever way it is taken.
    for way in ("exact", "finite-difference"):
        assert derivatives["gelu", way, "fp32"]["error"] < 0.01
        assert derivatives["gelu", way, "fp32"]["signs"] == 1.0
    typical = {
        (r["activation"], r["constrained"], r["what"]): r["typical"] for r in results["runs"]
    }
    assert typical["gelu", True, "finite differences"] < typical["gelu", True, "other batches"] / 10
    assert "| relu | off | bf16 |" in capsys.readouterr().out


def test_a_record_tells_its_circumstances(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "some.json"
    write(path, {"tables": [{"title": "T", "header": ["", "x"], "rows": [["a", "1"]]}]})
    record = read(path)
    assert {"git_revision", "git_dirty", "cpu", "cores", "gpu", "numpy", "python"} < set(record)
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["command"].startswith("python ")
    assert [p.name for p in path.parent.iterdir()] == ["some.json"]
    assert markdown(record).endswith("|  | x |\n| --- | --- |\n| a | 1 |\n")


def test_a_missed_target_is_called_missed() -> None:
    assert (within(2.2, 2.2), reaching(1.8, 1.8)) == ("2.20", "1.80")
    assert (within(2.21, 2.2), reaching(1.79, 1.8)) == ("2.21, **missed**", "1.79, **missed**")


def test_the_documentation_shows_the_kept_results() -> None:
    assert cost.kept_tables(cost.RESULTS) in (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
