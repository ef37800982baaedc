"""What only a GPU can show: precisions, fused kernels, memory that runs out, a run that goes on."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import GRADINIT, train_here, usual_options
from test_interruption import stop_and_resume
from test_precision_and_products import CONSTRAINED
from test_train import STANDSTILL, assert_scaled, scales_in
from torch import nn

from fairseq_gradinit.engine.batch_pairs import BatchPair
from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learning import learn_scales

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def scales_of(corpus, folder, *options: str, device: str = "cuda") -> dict[str, float]:
    base = usual_options() if device == "cpu" else usual_options("--cpu")
    run = train_here(corpus.translation, folder, *GRADINIT, *STANDSTILL, *options, base=base)
    assert run.code == 0, run.output
    assert f"|device:{device}" in run.output
    return scales_in(folder)


def differing(one: dict[str, float], other: dict[str, float]) -> float:
    """The share of the scales that differ by more than rounding.

    It may decide the direction of three iterations of 1e-2 each where that is a toss-up.
    """
    assert one.keys() == other.keys()
    assert len(set(one.values())) > 5
    return sum(abs(one[name] - other[name]) > 1e-2 for name in one) / len(one)


@pytest.fixture(scope="module")
def on_cpu(corpus, tmp_path_factory) -> dict[str, float]:
    return scales_of(corpus, tmp_path_factory.mktemp("cpu"), device="cpu")


@pytest.mark.parametrize(
    ("options", "few"),
    [("", 0.05), ("--fp16", 0.05), ("--amp", 0.05), ("--gradinit-precision bf16", 0.2)],
)
def test_scales_are_those_of_the_cpu(options, few, corpus, on_cpu, tmp_path):
    assert differing(scales_of(corpus, tmp_path, *options.split()), on_cpu) < few


@pytest.mark.parametrize("way", ["exact", "finite-difference", "auto"])
def test_the_constraint_is_that_of_the_cpu(way, corpus, tmp_path):
    """Fused attention has no second derivative on a GPU either."""
    on_gpu = scales_of(corpus, tmp_path / "gpu", *CONSTRAINED, "--gradinit-second-order", way)
    exact = [*CONSTRAINED, "--gradinit-second-order", "exact"]
    truth = scales_of(corpus, tmp_path / "cpu", *exact, device="cpu")
    assert differing(on_gpu, truth) < 0.1


def test_training_begins_from_the_scaled_weights_in_fp16(corpus, tmp_path):
    base = usual_options("--cpu")
    run = train_here(corpus.translation, tmp_path, *GRADINIT, "--fp16", base=base)
    assert len(run.updates) == 4
    for values in (run.initial, run.first):
        values.update({name: value.cpu() for name, value in values.items()})
    assert_scaled(run, tmp_path)


def test_an_interrupted_run_resumes(corpus, tmp_path):
    _, resumed, unbroken = stop_and_resume(corpus, tmp_path, base=usual_options("--cpu"))
    assert "|device:cuda" in unbroken.output
    assert resumed.lines("of 6, from ")
    assert differing(scales_in(tmp_path / "broken"), scales_in(tmp_path / "unbroken")) < 0.05


def test_micro_batches_are_halved_until_they_fit(caplog):
    """With less memory than a whole batch takes, the scales are the same."""
    caplog.set_level("WARNING")
    width, rows, megabytes = 256, 65_536, 2**20
    config = GradInitConfig(eta=1e-3, iterations=2)

    def scales() -> dict[str, float]:
        torch.manual_seed(1)
        layers = [layer for _ in range(6) for layer in (nn.Linear(width, width), nn.Tanh())]
        net = nn.Sequential(*layers).cuda()
        target = torch.linspace(-1, 1, width, device="cuda")

        def loss(x: torch.Tensor) -> tuple[torch.Tensor, float]:
            return (net(x) - target).pow(2).sum(), len(x)

        drawn = torch.randn(2, rows, width, device="cuda")
        pairs = [BatchPair([x[: 2 * rows // 3]], [x[rows // 3 :]]) for x in drawn]
        with deterministic(net):
            blocks = collect_blocks({"": net}, "fixed")
            learned = learn_scales(blocks, loss, pairs, config, halve=lambda x: list(x.chunk(2)))
        return learned.scale_of

    unlimited = scales()
    peak = torch.cuda.max_memory_reserved()
    gc.collect()
    torch.cuda.empty_cache()
    everything = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((peak - 300 * megabytes) / everything)
        limited = scales()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "with each micro-batch in 2 parts" in caplog.text
    assert limited == pytest.approx(unlimited, rel=1e-4)
