"""Mistakes: each is answered by one sentence and a non-zero exit, and nothing is lost.

Of those that `make_plan`, `PairedBatches` and `Scales` refuse, one each is made here from the
command line; `test_options`, `test_data` and `test_scales` have the others.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    OWN_USER_DIR,
    PLUGIN,
    SCALES_ALONE,
    Corpus,
    binarise,
    train,
    train_here,
    usual_options,
)

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.phase import require_writable

QUICK = ["--gradinit", "--gradinit-iterations", "2", "--max-update", "1", *SCALES_ALONE]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gradinit-gamma", "0"], "gamma must be a number greater than 0"),
        (["--gradinit-max-tokens", "10"], "raise --gradinit-max-tokens (now 10)"),
    ],
    ids=["of the options", "of the data"],
)
def test_a_refusal_ends_the_run_before_its_first_update(corpus, tmp_path, options, message):
    run = train_here(corpus.translation, tmp_path / "run", *QUICK, *options)
    assert message in run.error()
    assert not run.batches
    assert not list((tmp_path / "run").glob("*"))


def test_trying_whether_a_folder_can_be_written_leaves_it_as_it_was(tmp_path):
    # Of a process with the same number, in another container.
    other = tmp_path / f".gradinit_scales.json.{os.getpid()}"
    other.touch()
    require_writable(str(tmp_path))
    assert list(tmp_path.iterdir()) == [other]


def test_a_choice_that_does_not_exist(corpus, tmp_path):
    run = train_here(corpus.translation, tmp_path, *QUICK, "--gradinit-preset", "lamb")
    assert run.code == 2
    assert "argument --gradinit-preset: invalid choice: 'lamb'" in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("no_sample_size", "criterion NoSampleSize returned None as its sample size"),
        ("nothing_counted", "the sample size that the criterion returns must be greater than 0"),
        (
            "nan_loss",
            "the loss is nan in GradInit iteration 1, and 11 batches are more than may be ",
        ),
    ],
)
def test_a_criterion_that_gives_nothing_to_learn_from(corpus, tmp_path, criterion, message):
    base = usual_options("--criterion", "--label-smoothing")
    options = [*OWN_USER_DIR, "--criterion", criterion, *QUICK]
    run = train_here(corpus.translation, tmp_path, *options, base=base)
    assert message in run.error()
    assert not list(tmp_path.glob("*"))
    model = run.trainer.get_model()
    assert all(torch.equal(p, run.initial[name]) for name, p in model.named_parameters())


def test_a_nan_that_comes_later_gives_the_initial_weights_back(corpus, tmp_path):
    options = [*QUICK, "--gradinit-centering", "on", "--gradinit-eta", "1e38"]
    run = train_here(corpus.translation, tmp_path, *options)
    assert "lower eta, the learning rate of the scales, or max-scale" in run.error()
    model = run.trainer.get_model()
    assert all(torch.equal(p, run.initial[name]) for name, p in model.named_parameters())


def test_a_task_that_steers_the_optimizer_itself(corpus, tmp_path):
    options = [*OWN_USER_DIR, "--task", "task_with_its_own_optimizer_steps", *QUICK]
    run = train_here(corpus.translation, tmp_path, *options)
    assert "train_step uses the optimizer's zero_grad" in run.error()


def test_a_model_that_is_frozen_but_for_its_norm_gains(corpus, tmp_path):
    """One that is frozen altogether is refused by fairseq's optimizer before."""
    options = [*OWN_USER_DIR, "--arch", "half_frozen_transformer", "--freeze-but-norms", *QUICK]
    run = train_here(corpus.translation, tmp_path, *options)
    assert "the model has no parameter tensor that GradInit could scale" in run.error()


@pytest.mark.slow
def test_sentences_of_one_token_and_a_dictionary_of_four_words(tmp_path):
    words = [f"w{i % 4}" for i in range(240)]
    (tmp_path / "train.de").write_text("".join(f"{word}\n" for word in words))
    (tmp_path / "train.en").write_text("".join(f"{word}\n" for word in reversed(words)))
    pair = ("-s", "de", "-t", "en", "--joined-dictionary", "--trainpref", f"{tmp_path}/train")
    data = binarise(tmp_path / "mt", *pair)
    options = ["--gradinit", "--gradinit-iterations", "2", "--max-update", "2", "--no-save"]
    run = train_here(data, tmp_path / "run", *options, "--max-tokens", "60")
    assert run.code == 0, run.output
    assert len(run.updates) == 2
    assert len(run.lines("| gradinit: ")) == 2
    assert all(torch.isfinite(p).all() for p in run.weights.values())


@pytest.fixture(scope="module")
def scales_file(corpus: Corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scales")
    assert train_here(corpus.translation, folder, *QUICK, "--no-save").code == 0
    return folder / "gradinit_scales.json"


def test_a_scales_file_of_another_model(corpus, scales_file, tmp_path):
    options = ["--gradinit", "--gradinit-scales", scales_file, "--decoder-layers", "2"]
    error = train_here(corpus.translation, tmp_path, *options).error()
    assert "the scales were learned for another model" in error
    assert "decoder.layers.1.self_attn.k_proj.weight is not in the file" in error
    assert not list(tmp_path.glob("*"))


def test_a_scales_file_of_other_sizes(corpus, scales_file, tmp_path, caplog):
    usual = ["--encoder-ffn-embed-dim", "8", *QUICK, "--no-save", "--gradinit-scales"]
    assert train_here(corpus.translation, tmp_path, *usual, scales_file).code == 0
    assert (
        "these scales were learned at other sizes: encoder.layers.0.fc1.weight [32, 16], here "
        "[8, 16]; encoder.layers.0.fc1.bias [32], here [8]; "
    ) in caplog.text
    caplog.clear()
    # The run has left the same scales with its own sizes.
    own = tmp_path / "gradinit_scales.json"
    assert train_here(corpus.translation, tmp_path / "again", *usual, own).code == 0
    assert "other sizes" not in caplog.text


def test_a_file_that_holds_no_scales(corpus, tmp_path):
    options = ["--gradinit", "--gradinit-scales", corpus.source_text, "--max-update", "1"]
    error = train_here(corpus.translation, tmp_path, *options).error()
    assert "is not valid JSON" in error
    assert str(corpus.source_text) in error
    assert not list(tmp_path.glob("*"))


def test_a_save_dir_that_cannot_be_written(corpus, tmp_path):
    file = tmp_path / "file"
    file.write_text("dear")
    for folder in ("/proc/gradinit", file, file / "below"):
        with pytest.raises(GradInitError, match=f"cannot write to --save-dir {folder}: "):
            require_writable(str(folder))
    run = train_here(corpus.translation, file, *QUICK)
    assert f"cannot write to --save-dir {file}: " in run.error()
    assert run.trainer is None
    assert file.read_text() == "dear"


def test_a_disk_that_fills_up_keeps_the_old_scales(corpus, scales_file, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(scales_file.parent, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {f"gradinit_{name}.json" for name in ("scales", "effect", "state")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run = train_here(corpus.translation, folder, *QUICK, "--no-save", "--seed", "5")
    assert "No space left on device; choose a folder that can be written" in run.error()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_the_command_line_itself_ends_with_one_sentence(corpus, tmp_path):
    outcome = train(corpus.translation, tmp_path, *PLUGIN, "--gradinit-eta", "1")
    assert outcome.code == 1
    expected = "--gradinit-eta was given without --gradinit: add --gradinit, or leave it out"
    assert outcome.error() == expected
    assert "Traceback" not in outcome.output
    assert not list(tmp_path.glob("*"))
