"""The benchmark on rank collapse measures what it says, and does not disturb what it measures."""

from __future__ import annotations

import random
from dataclasses import replace

import collapse
import numpy as np
import pytest
import torch
from collapse import QUICK, Prober, name_for, options_of, token_share, with_other_sources
from conftest import tensors_of
from record import read

ARMS = collapse.arms_for(QUICK)


def share(*sentences: list[list[float]], kept: list[list[bool]] | None = None) -> float:
    """The share in one batch of these sentences, each a list of token vectors."""
    outputs = torch.tensor(sentences).transpose(0, 1)
    mask = torch.ones(outputs.shape[:2], dtype=torch.bool)
    return token_share([outputs], [mask if kept is None else torch.tensor(kept).t()])


def test_share_of_identical_tokens_is_0() -> None:
    assert share([[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]]) == 0.0


def test_share_of_tokens_with_zero_mean_is_1() -> None:
    assert share([[1.0, 2.0], [-1.0, 3.0]], [[0.0, -4.0], [0.0, -1.0]]) == 1.0


def test_share_by_hand() -> None:
    # The mean is (1, 1); 1 + 1 of 1 + 5 is left without it.
    assert share([[1.0, 0.0], [1.0, 2.0]]) == pytest.approx(1 / 3)


def test_share_leaves_padding_out() -> None:
    sentences = [[1.0, 0.0], [1.0, 2.0]], [[1.0, 1.0], [70.0, -50.0]]
    # The mean is (1, 1) still; 2 of 1 + 5 + 2 is left without it.
    assert share(*sentences, kept=[[True, True], [True, False]]) == pytest.approx(1 / 4)


def test_share_takes_one_mean_of_all_batches() -> None:
    # Positions and sentences differ in number between the batches.
    batches = [torch.full((2, 3, 4), 1.0), torch.full((6, 1, 4), -1.0)]
    mask = [torch.ones(batch.shape[:2], dtype=torch.bool) for batch in batches]
    assert token_share(batches, mask) == 1.0
    assert token_share(batches[:1], mask[:1]) == 0.0


def test_only_the_sources_change_places() -> None:
    rows, lengths = torch.arange(6).view(3, 2), torch.tensor([2, 2, 1])
    inputs = {"src_tokens": rows, "src_lengths": lengths, "prev_output_tokens": rows}
    batch = {"net_input": inputs, "target": rows}
    other = with_other_sources(batch)
    assert other["net_input"]["src_tokens"].tolist() == [[4, 5], [0, 1], [2, 3]]
    assert other["net_input"]["src_lengths"].tolist() == [1, 2, 2]
    assert other["net_input"]["prev_output_tokens"] is other["target"] is rows
    assert batch["net_input"]["src_tokens"] is rows


def train(corpus, folder, look, arm=ARMS[0]) -> list[float]:
    options = options_of(arm, 1, 1e-3, QUICK)
    return collapse.train([str(corpus.translation), *options, "--save-dir", str(folder)], look)


def state_of(trainer) -> tuple[object, ...]:
    """Of the random number generators, and the mode of every module."""
    modes = [module.training for module in trainer.get_model().modules()]
    modes.append(trainer.get_criterion().training)
    numpy_name, numpy_state, *numpy_rest = np.random.get_state()
    torch_state = torch.get_rng_state().tolist()
    return modes, random.getstate(), numpy_name, numpy_state.tolist(), numpy_rest, torch_state


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_training_is_the_same_with_the_probe_and_without(corpus, tmp_path, arm) -> None:
    trainers = {}
    prober = Prober(range(QUICK.updates + 1), QUICK.sentences)

    def look(trainer) -> None:
        trainers["with"] = trainer
        # fairseq seeds every update anew and sets the modes, which would hide a change of either.
        before = state_of(trainer)
        prober(trainer)
        assert state_of(trainer) == before

    with_probe = train(corpus, tmp_path / "with", look, arm)
    without = train(
        corpus, tmp_path / "without", lambda trainer: trainers.update(without=trainer), arm
    )
    assert with_probe == without
    assert len(without) == QUICK.updates
    assert [probe.update for probe in prober.probes] == [0, 1, 2, 3, 4]
    ends = {name: tensors_of(trainer.get_model()) for name, trainer in trainers.items()}
    for name, tensor in ends["without"].items():
        assert torch.equal(ends["with"][name], tensor), name


def test_a_probe_sees_the_same_in_batches_without_padding(corpus, tmp_path, monkeypatch) -> None:
    batched, single = Prober([4], 10), Prober([4], 10)
    shapes = {}

    def look(trainer) -> None:
        batched(trainer)
        with monkeypatch.context() as patch:
            patch.setattr(collapse, "BATCHES", 10)
            single(trainer)
        for prober in (batched, single):
            shapes[prober] = [batch["target"].ne(1) for batch in prober._batches]

    train(corpus, tmp_path, look)
    assert [len(mask) for mask in shapes[batched]] == [5, 5]
    assert not all(mask.all() for mask in shapes[batched])
    assert all(mask.all() for mask in shapes[single])
    (one,), (other,) = batched.probes, single.probes
    assert one.encoder == pytest.approx(other.encoder, rel=1e-4)
    assert one.decoder == pytest.approx(other.decoder, rel=1e-4)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert abs(one.source_bits) > 1e-3
    assert other.source_bits == 0.0  # a batch of one sentence has no other source


def test_a_quick_run_writes_table_and_picture(corpus, tmp_path, capsys) -> None:
    arguments = [str(corpus.translation), "--quick", "--seeds", "2", "--lr", "0.002"]
    collapse.main([*arguments, "--results", str(tmp_path)])
    results = read(tmp_path / "collapse-2e-3.json")["results"]
    assert (tmp_path / "collapse-2e-3.png").stat().st_size > 10_000
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [
        (arm.name, seed) for seed in (1, 2) for arm in ARMS
    ]
    for run in results["runs"]:
        assert len(run["training"]) == QUICK.updates
        for probe in run["probes"]:
            assert len(probe["encoder"]) == len(probe["decoder"]) == 3
            assert all(0.0 < share < 1.0 for share in probe["encoder"] + probe["decoder"])
    first, second = (run["training"] for run in results["runs"][:: len(ARMS)])
    assert first != second
    default, warm, gradinit, small = (run["probes"][0] for run in results["runs"][: len(ARMS)])
    assert default == warm != gradinit != small
    (table,) = results["tables"]
    assert table["header"] == ["", "", "0", "1", "2", "3", "4"]
    assert [row[0] for row in table["rows"][::4]] == [arm.name for arm in ARMS]
    mean = sum(run["probes"][-1]["loss"] for run in results["runs"][:: len(ARMS)]) / 2
    assert table["rows"][2][1:] == ["validation loss", *table["rows"][2][2:6], f"{mean:.2f}"]
    assert "mean of 2 seeds" in capsys.readouterr().out


def test_warmup_takes_a_quarter_of_the_updates() -> None:
    _, warmup, *_ = collapse.arms_for(replace(QUICK, updates=400))
    assert warmup.options == ("--warmup-updates", "100")


@pytest.mark.parametrize(
    ("rate", "name"),
    [(1e-3, "collapse"), (5e-4, "collapse-5e-4"), (1.5e-3, "collapse-1.5e-3")],
)
def test_the_rate_names_the_files(rate: float, name: str) -> None:
    assert name_for(rate) == name
