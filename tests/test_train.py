"""What GradInit leaves to training: scaled weights everywhere, and nothing else changed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import GRADINIT, OWN_USER_DIR, SCALES_ALONE, Training, train_here, usual_options

from fairseq_gradinit.plugin.batches import PairedBatches
from fairseq_gradinit.plugin.phase import run_phase
from fairseq_gradinit.scales.file import SCALES_FILE, Scales

# For tests that centering does not concern.
UNCENTERED = [*GRADINIT, *SCALES_ALONE]
# Training that changes no weight: what it ends with is what GradInit left to it.
STANDSTILL = ["--lr", "1e-30", "--gradinit-eta", "3e-3", "--max-update", "2"]
SKIPPED = "skipping GradInit: the weights come from a checkpoint"
# Eight updates are an epoch of the small corpus.
OVER_AN_EPOCH = ["--max-update", "11"]


def scales_in(folder: Path) -> dict[str, float]:
    return {block.name: block.scale for block in Scales.load(folder / SCALES_FILE).blocks}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def assert_scaled(run: Training, folder: Path) -> None:
    """Training began from the initial weights times the scales in `folder`, biases centered."""
    assert run.code == 0, run.output
    blocks = Scales.load(folder / SCALES_FILE).blocks
    assert {block.name for block in blocks} == run.initial.keys()
    assert len({block.scale for block in blocks}) > 5
    for block in blocks:
        initial, first = run.initial[block.name], run.first[block.name]
        if block.state == "centered":
            assert re.fullmatch(r".*norm.*\.bias", block.name)
            assert first.any(), block.name
        else:
            scaled = (initial.float() * torch.tensor(block.scale)).to(initial.dtype)
            assert torch.equal(first, scaled), block.name


@pytest.fixture(scope="module")
def learned(corpus, tmp_path_factory) -> tuple[Path, Training, list[torch.Tensor]]:
    """A run, and the state of torch's generator before and after its phase of GradInit."""
    folder, random_states = tmp_path_factory.mktemp("learned"), []

    def watched(*arguments):
        random_states.append(torch.get_rng_state())
        run_phase(*arguments)
        random_states.append(torch.get_rng_state())

    options = [*GRADINIT, *OVER_AN_EPOCH, "--save-interval-updates", "4"]
    with mock.patch("fairseq_gradinit.plugin.hook.run_phase", watched):
        return folder, train_here(corpus.translation, folder, *options), random_states


def test_training_sees_the_same_data_and_random_numbers_as_without(corpus, tmp_path, learned):
    _, run, random_states = learned
    plain = train_here(corpus.translation, tmp_path, *OVER_AN_EPOCH)
    assert len(plain.batches) == 11
    assert run.batches == plain.batches
    assert run.updates != plain.updates
    assert torch.equal(*random_states)


def test_gradinit_runs_once_and_gives_the_same_numbers_again(corpus, learned, tmp_path):
    folder, run, _ = learned
    assert len(run.lines("begin training epoch")) == 2
    assert len(run.lines("GradInit: learning")) == 1
    assert not run.lines(SKIPPED)
    again = train_here(corpus.translation, tmp_path, *GRADINIT, *OVER_AN_EPOCH)
    assert again.updates == run.updates
    assert same(again.weights, run.weights)
    assert (tmp_path / SCALES_FILE).read_bytes() == (folder / SCALES_FILE).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        # Plain --fp16 keeps its fp32 copies in one flat buffer, which fairseq makes on a GPU only.
        "--update-freq 2 --store-ema --batch-size 24 --gradinit-gamma 30",
        "--fp16 --fp16-no-flatten-grads --encoder-layerdrop 0.5 --dropout 0.5",
        "--memory-efficient-fp16 --share-all-embeddings --gradinit-norm-gains learned",
    ],
)
def test_training_starts_from_the_scaled_weights(corpus, tmp_path, options):
    run = train_here(corpus.translation, tmp_path, *GRADINIT, *STANDSTILL, *options.split())
    assert_scaled(run, tmp_path)
    checkpoint = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    for name, weight in run.first.items():
        torch.testing.assert_close(run.weights[name], weight, rtol=0, atol=1e-25)
        assert torch.equal(checkpoint["model"][name], run.weights[name])
        if "--store-ema" in options:
            torch.testing.assert_close(checkpoint["extra_state"]["ema"][name], weight)


def test_the_constraint_is_met_where_it_is_asked_for(corpus, tmp_path):
    options = ["--gradinit-preset", "paper", "--gradinit-max-tokens", "600", "--max-update", "1"]
    options += ["--gradinit-iterations", "4", "--gradinit-gamma", "30", "--no-save"]
    run = train_here(corpus.translation, tmp_path, "--gradinit", *options)
    history = Scales.load(tmp_path / SCALES_FILE).history
    found = [(iteration.kind, iteration.grad_norm > 30) for iteration in history]
    assert found == [("constraint", True)] * 4
    assert len(run.lines("kind=constraint")) == 4


def test_scales_of_one_change_no_number(corpus, learned, tmp_path):
    """The optimizer, its schedule and the moving average are built again, and are the same."""
    base = usual_options("--lr-scheduler", "--warmup-updates", "--total-num-update")
    options = ["--lr-scheduler", "inverse_sqrt", "--warmup-updates", "5", "--store-ema"]
    document = json.loads((learned[0] / SCALES_FILE).read_text())
    for block in document["blocks"]:
        block["scale"] = 1.0
    ones = tmp_path / "ones.json"
    ones.write_text(json.dumps(document))
    gradinit = ("--gradinit", "--gradinit-scales", ones, "--gradinit-centering", "off")
    without, with_ones = (
        train_here(
            *(corpus.translation, tmp_path / folder, *added, *options, *OVER_AN_EPOCH),
            base=base,
        )
        for folder, added in (("without", ()), ("ones", gradinit))
    )
    assert with_ones.lines("applied the scales in")
    assert with_ones.lines("the first update has learning rate 0, and the scales are for 0.001")
    assert without.updates == with_ones.updates
    assert len(without.updates) == 11
    assert same(without.weights, with_ones.weights)


def test_a_scales_file_gives_what_learning_gave(corpus, learned, tmp_path):
    folder, run, _ = learned
    options = ["--gradinit", "--gradinit-scales", folder / SCALES_FILE, *OVER_AN_EPOCH]
    applied = train_here(corpus.translation, tmp_path, *options)
    assert not applied.lines("GradInit: learning")
    assert same(applied.first, run.first)
    assert same(applied.weights, run.weights)
    assert (tmp_path / SCALES_FILE).read_bytes() == (folder / SCALES_FILE).read_bytes()


def test_a_resumed_run_skips_gradinit_and_ends_as_an_unbroken_one(corpus, learned, tmp_path):
    folder, run, _ = learned
    shutil.copy(folder / "checkpoint_1_4.pt", tmp_path / "checkpoint_last.pt")
    resumed = train_here(corpus.translation, tmp_path, *GRADINIT, *OVER_AN_EPOCH)
    assert len(resumed.lines(SKIPPED)) == 1
    assert not resumed.lines("GradInit: learning")
    assert not (tmp_path / SCALES_FILE).exists()
    assert resumed.batches == run.batches[4:]
    assert same(resumed.weights, run.weights)


@pytest.mark.parametrize(
    "restored",
    ["--finetune-from-model", "--reset-optimizer --reset-meters --reset-dataloader --restore-file"],
)
def test_weights_from_a_checkpoint_are_left_alone(corpus, learned, tmp_path, restored):
    options = [*restored.split(), learned[0] / "checkpoint_last.pt", "--max-update", "1"]
    run = train_here(corpus.translation, tmp_path, *GRADINIT, *options)
    assert len(run.lines(SKIPPED)) == 1
    assert same(run.first, learned[1].weights)
    assert not (tmp_path / SCALES_FILE).exists()


def test_the_loss_of_several_language_pairs_is_their_sum(corpus, tmp_path):
    """GradInit's first loss, at the initial weights, against the losses of the pairs by hand."""
    task = ["--task", "multilingual_translation", "--lang-pairs", "de-en,en-de"]
    task += ["--arch", "multilingual_transformer_iwslt_de_en"]
    options = [*task, *UNCENTERED, *STANDSTILL, "--lr", "1e-3"]
    trainer = (run := train_here(corpus.translation, tmp_path, *options)).trainer
    model, criterion = trainer.get_model().eval(), trainer.get_criterion()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(run.initial[name])
    (batch,) = next(iter(PairedBatches(trainer, 600, None, 1))).first
    assert set(batch.sample) == {"de-en", "en-de"}
    total = count = 0.0
    for direction, part in batch.sample.items():
        loss, size, _ = criterion(model.models[direction], part)
        total, count = total + float(loss.detach()), count + float(size)
    history = Scales.load(tmp_path / SCALES_FILE).history
    assert history[0].loss == pytest.approx(total / count, rel=1e-5)


def test_pieces_of_a_user_dir(corpus, tmp_path):
    """A criterion with parameters, a half frozen model, and a task registered after the options.

    The loss is a vector of one, the sample size a tensor.
    """
    base = usual_options("--criterion", "--label-smoothing")
    options = ["--criterion", "with_parameters", "--arch", "half_frozen_transformer"]
    options += ["--task", "task_registered_later", *OWN_USER_DIR, *UNCENTERED, *STANDSTILL]
    run = train_here(corpus.translation, tmp_path, *options, base=base)
    assert run.code == 0, run.output
    task = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)["cfg"]["task"]
    assert (task["gradinit"], task["gradinit_iterations"]) == (True, 3)
    (line,) = run.lines("frozen, so kept at scale 1: ")
    frozen = line.partition("scale 1: ")[2].split(", ")
    assert frozen == [name for name in run.initial if name.startswith("encoder.")]
    assert all(torch.equal(run.first[name], run.initial[name]) for name in frozen)
    scales = scales_in(tmp_path)
    assert set(scales) == run.initial.keys() - set(frozen) | {"criterion.temperature"}
    scale = scales["criterion.temperature"]
    assert scale != 1.0
    found = run.trainer.get_criterion().temperature.detach()
    assert torch.equal(found, torch.full((1,), 1.5) * torch.tensor(scale))
