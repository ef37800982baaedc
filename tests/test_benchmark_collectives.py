"""What GradInit moves between processes is what the formula says, and the plan follows from it."""

from __future__ import annotations

import json

import collectives
import pytest
import torch
from collectives import OBJECTIVE, Batch, Counted, Model, Throughput, Traffic


def test_two_processes_move_what_the_formula_says(tmp_path, capfd) -> None:
    collectives.main(["--quick", "--results", str(tmp_path)])
    results = json.loads((tmp_path / "collectives.json").read_text())["results"]
    counted = {row["kind"]: row["bytes"] for row in results["counted"]}
    parameters, scales = results["model"]["parameters"], results["model"]["scales"]
    assert counted.keys() == collectives.EXPECTED.keys()
    assert counted["objective"] == 4 * parameters + 24 * scales + 40
    assert counted[collectives.TRAINING] == 4 * parameters
    assert f"P = {parameters:,}, K = {scales}" in capfd.readouterr().out


def test_a_count_that_is_not_the_formula_ends_the_benchmark(monkeypatch, tmp_path) -> None:
    found = [Counted("objective", calls=5, bytes=1), Counted(collectives.BEGIN, calls=2, bytes=0)]
    monkeypatch.setattr(collectives, "count", lambda workload: found)
    with pytest.raises(SystemExit, match="objective: 5 collectives of 1 bytes, expected 5 of "):
        collectives.main(["--quick", "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_counter_sees_every_tensor_and_then_stands_aside(tmp_path) -> None:
    all_reduce = torch.distributed.all_reduce
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        with collectives.counter() as sizes:
            torch.distributed.all_reduce(torch.ones(3, dtype=torch.float64))
            torch.distributed.broadcast(torch.ones(5, dtype=torch.uint8), 0)
        assert sizes == [24, 5]
    finally:
        torch.distributed.destroy_process_group()
    assert torch.distributed.all_reduce is all_reduce


def test_traffic_names_its_terms() -> None:
    assert str(Traffic(gradients=2, compared=1)) == "2 · 4 P + 8 (2 K + 1)"
    assert Traffic(centered=1).bytes(Model(1, 1, norms=(3, 4))) == 72


def test_the_time_of_a_run_follows_from_tokens_throughput_and_network() -> None:
    model = Model(parameters=10**8, scales=10)
    throughput = Throughput("machine", training=1000.0, gradinit=500.0)
    alone = collectives.cost(model, Batch(4000, machines=1), throughput, faster=2.0)
    assert alone.update == pytest.approx(2.0 / 3600)
    assert alone.training == pytest.approx(collectives.UPDATES * alone.update)
    assert alone.gradinit == pytest.approx(60 * 2 * 4.0 / 3600)
    two = collectives.cost(model, Batch(4000, machines=2), throughput, faster=2.0)
    assert two.update == pytest.approx((1.0 + 2e8 / collectives.NETWORK) / 3600)
    summed = OBJECTIVE.bytes(model) / collectives.NETWORK
    assert two.gradinit == pytest.approx(60 * (4.0 + summed) / 3600)
