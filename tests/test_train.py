"""What GradInit leaves to training: scaled weights everywhere, and nothing else changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import (
    GRADINIT,
    OWN_USER_DIR,
    SCALES_ALONE,
    Corpus,
    Training,
    train_here,
    usual_options,
)

from fairseq_gradinit.plugin.phase import run_phase

# For tests that centering does not concern.
UNCENTERED = [*GRADINIT, *SCALES_ALONE]
# Training that changes no weight: what it ends with is what GradInit left to it.
STANDSTILL = ["--lr", "1e-30", "--gradinit-eta", "3e-3", "--max-update", "2"]
SKIPPED = "skipping GradInit: the weights come from a checkpoint"
# Eight updates are an epoch of the small corpus.
OVER_AN_EPOCH = ["--max-update", "11"]


def scales_in(folder: Path) -> dict[str, float]:
    document = json.loads((folder / "gradinit_scales.json").read_text())
    return {block["name"]: block["scale"] for block in document["blocks"]}


def centered_in(folder: Path) -> set[str]:
    document = json.loads((folder / "gradinit_scales.json").read_text())
    return {block["name"] for block in document["blocks"] if block["state"] == "centered"}


def write_ones(source: Path, path: Path) -> Path:
    """The scales file in `source` with all scales 1."""
    document = json.loads((source / "gradinit_scales.json").read_text())
    for block in document["blocks"]:
        block["scale"] = 1.0
    path.write_text(json.dumps(document))
    return path


def slow(*options: list[str]) -> list:
    """Parameters of the slow tier."""
    return [pytest.param(option, marks=pytest.mark.slow) for option in options]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def plain(corpus: Corpus, folders: Path) -> Training:
    return train_here(corpus.translation, folders / "plain", *OVER_AN_EPOCH)


@pytest.fixture(scope="module")
def random_states() -> list[torch.Tensor]:
    """Of torch's generator before and after the phase of `learned`."""
    return []


@pytest.fixture(scope="module")
def learned(corpus: Corpus, folders: Path, random_states: list[torch.Tensor]) -> Training:
    def watched(*arguments):
        random_states.append(torch.get_rng_state())
        run_phase(*arguments)
        random_states.append(torch.get_rng_state())

    options = [*GRADINIT, *OVER_AN_EPOCH, "--save-interval-updates", "4"]
    with mock.patch("fairseq_gradinit.plugin.hook.run_phase", watched):
        return train_here(corpus.translation, folders / "learned", *options)


def test_training_sees_the_same_data_in_the_same_order(plain, learned):
    assert len(plain.batches) == 11
    assert learned.batches == plain.batches
    assert learned.updates != plain.updates


def test_random_numbers_are_not_used_up(learned, random_states):
    assert torch.equal(*random_states)


def test_gradinit_runs_once_in_two_epochs(learned):
    assert learned.code == 0
    assert len(learned.lines("begin training epoch")) == 2
    assert len(learned.lines("GradInit: learning")) == 1
    assert not learned.lines(SKIPPED)


def test_the_same_command_gives_the_same_numbers(corpus, folders, learned, tmp_path):
    again = train_here(corpus.translation, tmp_path, *GRADINIT, *OVER_AN_EPOCH)
    assert again.updates == learned.updates
    assert same(again.weights, learned.weights)
    first = (folders / "learned" / "gradinit_scales.json").read_bytes()
    assert (tmp_path / "gradinit_scales.json").read_bytes() == first


@pytest.mark.parametrize(
    "options",
    [
        ["--update-freq", "2", "--store-ema"],
        # Plain --fp16 keeps its fp32 copies in one flat buffer, which fairseq makes on a GPU only.
        ["--fp16", "--fp16-no-flatten-grads"],
        *slow(
            ["--amp"],
            ["--memory-efficient-fp16"],
            ["--share-all-embeddings"],
            ["--gradinit-gamma", "30"],
            ["--gradinit-gamma", "30", "--gradinit-optimizer", "sgd-normalized"],
            ["--gradinit-norm-gains", "learned"],
            ["--batch-size", "24"],
            ["--encoder-layerdrop", "0.5", "--dropout", "0.5"],
        ),
    ],
    ids=" ".join,
)
def test_training_starts_from_the_scaled_weights(corpus, tmp_path, options):
    run = train_here(corpus.translation, tmp_path, *GRADINIT, *STANDSTILL, *options)
    assert run.code == 0, run.output
    scales = scales_in(tmp_path)
    assert len(set(scales.values())) > 5
    assert scales.keys() == run.initial.keys()
    centered = centered_in(tmp_path)
    assert centered == {name for name in scales if name.endswith("layer_norm.bias")}
    for name, initial in run.initial.items():
        scaled = (initial.float() * torch.tensor(scales[name])).to(initial.dtype)
        if name in centered:
            scaled = run.first[name]
            assert scaled.any(), name
        assert torch.equal(run.first[name], scaled), name
        torch.testing.assert_close(run.weights[name], scaled, rtol=0, atol=1e-25)
    checkpoint = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert torch.equal(checkpoint["model"][name], run.weights[name])
    if "--store-ema" in options:
        average = checkpoint["extra_state"]["ema"]
        for name, weight in run.first.items():
            torch.testing.assert_close(average[name], weight)


def test_the_constraint_is_met_where_it_is_asked_for(corpus, tmp_path):
    options = ["--gradinit-preset", "paper", "--gradinit-max-tokens", "600", "--max-update", "1"]
    options += ["--gradinit-iterations", "4", "--gradinit-gamma", "30", "--no-save"]
    run = train_here(corpus.translation, tmp_path, "--gradinit", *options)
    assert run.code == 0, run.output
    history = json.loads((tmp_path / "gradinit_scales.json").read_text())["history"]
    norms = [row["grad_norm"] for row in history]
    assert [row["kind"] for row in history] == ["constraint"] * 4
    assert all(row["trial_loss"] is None for row in history)
    assert min(norms) > 30
    assert len(run.lines("kind=constraint")) == 4
    assert len(run.lines("gamma=30, ")) == 4


@pytest.mark.parametrize(
    "options",
    [
        ["--lr-scheduler", "inverse_sqrt", "--warmup-updates", "5"],
        *slow(
            ["--lr-scheduler", "cosine", "--warmup-updates", "0"],
            ["--lr-scheduler", "fixed", "--force-anneal", "2"],
            ["--lr-scheduler", "reduce_lr_on_plateau"],
            ["--store-ema", "--update-freq", "2"],
        ),
    ],
    ids=" ".join,
)
def test_scales_of_one_change_no_number(corpus, folders, learned, tmp_path, options):
    """The optimizer, its schedule and the moving average are built again, and are the same."""
    schedule = ["--lr-scheduler", "--warmup-updates", "--total-num-update"]
    base = usual_options(*schedule) if "--lr-scheduler" in options else []
    options = [*options, *OVER_AN_EPOCH]
    ones = write_ones(folders / "learned", tmp_path / "ones.json")
    without = train_here(corpus.translation, tmp_path / "without", *options, base=base)
    with_ones = train_here(
        corpus.translation,
        tmp_path / "ones",
        *("--gradinit", "--gradinit-scales", ones, "--gradinit-centering", "off", *options),
        base=base,
    )
    assert without.code == with_ones.code == 0
    assert with_ones.lines("applied the scales in")
    warned = with_ones.lines("the first update has learning rate 0, and the scales are for 0.001")
    assert len(warned) == ("--warmup-updates 5" in " ".join(options))
    assert without.updates == with_ones.updates
    assert len(without.updates) == 11
    assert same(without.weights, with_ones.weights)


def test_a_scales_file_gives_what_learning_gave(corpus, folders, learned, tmp_path):
    file = folders / "learned" / "gradinit_scales.json"
    options = ["--gradinit", "--gradinit-scales", file, *OVER_AN_EPOCH]
    applied = train_here(corpus.translation, tmp_path, *options)
    assert applied.code == 0
    assert not applied.lines("GradInit: learning")
    assert same(applied.first, learned.first)
    assert same(applied.weights, learned.weights)
    assert (tmp_path / "gradinit_scales.json").read_bytes() == file.read_bytes()


def test_a_resumed_run_skips_gradinit_and_ends_as_an_unbroken_one(
    corpus, folders, learned, tmp_path
):
    shutil.copy(folders / "learned" / "checkpoint_1_4.pt", tmp_path / "checkpoint_last.pt")
    resumed = train_here(corpus.translation, tmp_path, *GRADINIT, *OVER_AN_EPOCH)
    assert len(resumed.lines(SKIPPED)) == 1
    assert not resumed.lines("GradInit: learning")
    assert not (tmp_path / "gradinit_scales.json").exists()
    assert resumed.batches == learned.batches[4:]
    assert same(resumed.weights, learned.weights)


@pytest.mark.parametrize(
    "restored",
    [
        ["--finetune-from-model"],
        [*("--reset-optimizer", "--reset-meters", "--reset-dataloader"), "--restore-file"],
    ],
    ids=lambda options: options[0],
)
def test_weights_from_a_checkpoint_are_left_alone(corpus, folders, learned, tmp_path, restored):
    checkpoint = folders / "learned" / "checkpoint_last.pt"
    run = train_here(
        corpus.translation, tmp_path, *GRADINIT, *restored, checkpoint, "--max-update", "1"
    )
    assert run.code == 0
    assert len(run.lines(SKIPPED)) == 1
    assert same(run.first, learned.weights)
    assert not (tmp_path / "gradinit_scales.json").exists()


def test_the_options_are_in_the_checkpoint(folders, learned):
    checkpoint = torch.load(folders / "learned" / "checkpoint_last.pt", weights_only=True)
    task = checkpoint["cfg"]["task"]
    assert task["gradinit"] is True
    assert task["gradinit_iterations"] == 3
    assert task["gradinit_preset"] == "default"
    assert task["gradinit_gamma"] is None


LANGUAGE_MODEL = [
    *("--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "16"),
    *("--decoder-layers", "2", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64"),
    *("--decoder-attention-heads", "2"),
]
MASKED_LM = [
    *("--task", "masked_lm", "--arch", "roberta_base", "--tokens-per-sample", "16"),
    *("--encoder-layers", "2", "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64"),
    *("--encoder-attention-heads", "2", "--criterion", "masked_lm"),
]
TWO_DIRECTIONS = ["--lang-pairs", "de-en,en-de"]
MULTILINGUAL = [
    *("--task", "multilingual_translation", "--arch", "multilingual_transformer_iwslt_de_en"),
    *TWO_DIRECTIONS,
]
SAMPLED = [
    *("--task", "translation_multi_simple_epoch", "--langs", "de,en", *TWO_DIRECTIONS),
    *("--encoder-langtok", "tgt", "--enable-reservsed-directions-shared-datasets"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "criterion"),
    [
        (LANGUAGE_MODEL, ["--criterion", "cross_entropy"]),
        (MASKED_LM, []),
        (MULTILINGUAL, None),
        ([*SAMPLED, "--sampling-method", "temperature"], None),
        ([*SAMPLED, "--sampling-method", "RoundRobin"], None),
        (["--arch", "lstm", "--encoder-hidden-size", "32"], ["--criterion", "cross_entropy"]),
    ],
    ids=["language_modeling", "masked_lm", "multilingual", "temperature", "RoundRobin", "lstm"],
)
def test_any_task_takes_the_options_and_keeps_its_data(corpus, tmp_path, task, criterion):
    sizes = [o for o in usual_options() if o.startswith(("--arch", "--encoder-", "--decoder-"))]
    changed = [] if criterion is None else [*sizes, "--criterion", "--label-smoothing"]
    base = [*usual_options(*changed), *(criterion or [])]
    text_only = task in (LANGUAGE_MODEL, MASKED_LM)
    data = corpus.language_model if text_only else corpus.translation
    without = train_here(data, tmp_path, *task, "--no-save", base=base)
    run = train_here(data, tmp_path, *task, *GRADINIT, *STANDSTILL, "--max-update", "4", base=base)
    assert without.code == run.code == 0, run.output
    assert run.batches == without.batches
    assert len(run.lines("| gradinit: ")) == 3
    scales = scales_in(tmp_path)
    assert run.initial.keys() == scales.keys()
    assert len(set(scales.values())) > 5
    centered = centered_in(tmp_path)
    for name, initial in run.initial.items():
        if name in centered:
            assert run.first[name].any(), name
        else:
            assert torch.equal(run.first[name], initial * torch.tensor(scales[name])), name
    checkpoint = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    task_cfg = checkpoint["cfg"]["task"]
    options = task_cfg if isinstance(task_cfg, dict) else vars(task_cfg)
    assert options["gradinit"] is True
    assert options["gradinit_iterations"] == 3


def test_the_loss_of_several_language_pairs_is_their_sum(corpus, tmp_path):
    """GradInit's first loss, at the initial weights, against the losses of the pairs by hand."""
    run = train_here(
        corpus.translation,
        *(tmp_path, *MULTILINGUAL, *UNCENTERED, *STANDSTILL, "--lr", "1e-3"),
    )
    trainer = run.trainer
    model, criterion = trainer.get_model().eval(), trainer.get_criterion()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(run.initial[name])
    from fairseq_gradinit.plugin.batches import PairedBatches

    pair = next(iter(PairedBatches(trainer, 600, None, 1)))
    (batch,) = pair.first
    sample = batch.sample
    assert set(sample) == {"de-en", "en-de"}
    total = count = 0.0
    for direction, part in sample.items():
        loss, size, _ = criterion(model.models[direction], part)
        total, count = total + float(loss.detach()), count + float(size)
    history = json.loads((tmp_path / "gradinit_scales.json").read_text())["history"]
    assert history[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_criterion_with_parameters_is_scaled_too(corpus, tmp_path):
    """It also gives its loss as a vector of one, and its sample size as a tensor."""
    base = usual_options("--criterion", "--label-smoothing")
    base += ["--criterion", "with_parameters"]
    run = train_here(
        corpus.translation, tmp_path, *OWN_USER_DIR, *UNCENTERED, *STANDSTILL, base=base
    )
    assert run.code == 0, run.output
    scale = scales_in(tmp_path)["criterion.temperature"]
    assert scale != 1.0
    found = run.trainer.get_criterion().temperature.detach()
    assert torch.equal(found, torch.full((1,), 1.5) * torch.tensor(scale))


def test_biases_that_dynamic_convolutions_leave_unset_are_no_obstacle(
    corpus, tmp_path, monkeypatch
):
    """fairseq allocates them, and neither fills nor uses them; here the memory held NaN."""
    from fairseq.modules import DynamicConv_scripatable

    reset = DynamicConv_scripatable.reset_parameters

    def leave_unset(conv):
        reset(conv)
        conv.conv_bias.data.fill_(float("nan"))

    monkeypatch.setattr(DynamicConv_scripatable, "reset_parameters", leave_unset)
    options = ["--arch", "lightconv_iwslt_de_en", "--weight-softmax", "True"]
    for side in ("encoder", "decoder"):
        options += [f"--{side}-conv-type", "dynamic", f"--{side}-kernel-size-list", "[3]"]
    run = train_here(corpus.translation, tmp_path, *UNCENTERED, *STANDSTILL, *options)
    assert run.code == 0, run.output
    unset = [name for name in run.initial if name.endswith("conv_bias")]
    assert len(unset) == 2
    scales = scales_in(tmp_path)
    for name in unset:
        assert scales[name] == 1.0
        assert not run.first[name].any()


def test_frozen_tensors_are_listed_and_kept(corpus, tmp_path):
    options = ["--arch", "half_frozen_transformer", *STANDSTILL]
    run = train_here(corpus.translation, tmp_path, *OWN_USER_DIR, *UNCENTERED, *options)
    assert run.code == 0, run.output
    (line,) = run.lines("frozen, so kept at scale 1: ")
    frozen = line.partition("scale 1: ")[2].split(", ")
    assert frozen == [name for name in run.initial if name.startswith("encoder.")]
    assert all(torch.equal(run.first[name], run.initial[name]) for name in frozen)
    assert set(scales_in(tmp_path)) == run.initial.keys() - set(frozen)


def test_a_task_registered_through_a_name_imported_before_the_plugin(corpus, tmp_path):
    options = ["--task", "task_registered_later", "--max-update", "1"]
    run = train_here(corpus.translation, tmp_path, *OWN_USER_DIR, *UNCENTERED, *options)
    assert run.code == 0, run.output
    assert run.lines("GradInit: learning")
    task = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)["cfg"]["task"]
    assert task["gradinit"] is True
