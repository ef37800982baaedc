"""Mistakes: each is answered by one sentence and a non-zero exit, and nothing is lost.

Of those that `make_plan`, `PairedBatches` and `Scales` refuse, one each is made here from the
command line; `test_options`, `test_data` and `test_scales` have the others.
"""

from __future__ import annotations

import os

import pytest
import torch
from conftest import OWN_USER_DIR, SCALES_ALONE, binarise, train_here, usual_options
from test_train import same

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.trainer import require_writable
from fairseq_gradinit.scales.file import SCALES_FILE

QUICK = ["--gradinit", "--gradinit-iterations", "2", "--max-update", "1", *SCALES_ALONE]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gradinit-gamma 0", "gamma must be a number greater than 0"),
        ("--gradinit-max-tokens 10", "raise --gradinit-max-tokens (now 10)"),
        ("--gradinit-centering on --gradinit-eta 1e38", "lower eta, the learning rate of the s"),
        ("--criterion no_sample_size", "criterion NoSampleSize returned None as its sample size"),
        ("--criterion nothing_counted", "the sample size that the criterion returns must be gr"),
        ("--criterion nan_loss", "the loss is nan in GradInit iteration 1, and 11 batches are mo"),
        ("--task task_with_its_own_optimizer_steps", "train_step uses the optimizer's zero_grad"),
        # fairseq's optimizer refuses a model that is frozen altogether.
        ("--arch half_frozen_transformer --freeze-but-norms", "no parameter tensor that GradInit"),
    ],
)
def test_a_refusal_ends_the_run_before_its_first_update(corpus, tmp_path, options, message):
    """And gives the initial weights back."""
    base = usual_options("--criterion", "--label-smoothing") if "criterion" in options else []
    words = [*OWN_USER_DIR, *QUICK, *options.split()]
    run = train_here(corpus.translation, tmp_path / "run", *words, base=base)
    assert message in run.error()
    assert not run.batches
    assert not list((tmp_path / "run").glob("*"))
    if run.trainer is not None:
        assert same(run.weights, run.initial)


def test_trying_whether_a_folder_can_be_written_leaves_it_as_it_was(tmp_path):
    # Of a process with the same number, in another container.
    other = tmp_path / f".gradinit_scales.json.{os.getpid()}"
    other.touch()
    require_writable(str(tmp_path))
    assert list(tmp_path.iterdir()) == [other]


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


def test_a_scales_file_of_other_sizes_and_of_another_model(corpus, tmp_path, caplog):
    assert train_here(corpus.translation, tmp_path, *QUICK, "--no-save").code == 0
    usual = ["--encoder-ffn-embed-dim", "8", *QUICK, "--no-save", "--gradinit-scales"]
    own = tmp_path / "own"
    assert train_here(corpus.translation, own, *usual, tmp_path / SCALES_FILE).code == 0
    assert (
        "these scales were learned at other sizes: encoder.layers.0.fc1.weight [32, 16], here "
        "[8, 16]; encoder.layers.0.fc1.bias [32], here [8]; "
    ) in caplog.text
    caplog.clear()
    # The run has left the same scales with its own sizes.
    assert train_here(corpus.translation, tmp_path / "again", *usual, own / SCALES_FILE).code == 0
    assert "other sizes" not in caplog.text
    options = ["--gradinit", "--gradinit-scales", own / SCALES_FILE, "--decoder-layers", "2"]
    error = train_here(corpus.translation, tmp_path / "other", *options).error()
    assert "the scales were learned for another model" in error
    assert "decoder.layers.1.self_attn.k_proj.weight is not in the file" in error


def test_a_file_that_holds_no_scales(corpus, tmp_path):
    run = train_here(corpus.translation, tmp_path, "--gradinit", "--gradinit-scales", __file__)
    assert f"{__file__} is not valid JSON" in run.error()


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
