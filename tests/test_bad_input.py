"""Mistakes: each is answered by one sentence and a non-zero exit, and nothing is lost.

What `make_plan`, `PairedBatches` and `Scales` refuse is in `test_options`, `test_data` and
`test_scales`.
"""

from __future__ import annotations

import pytest
from conftest import OWN_USER_DIR, SCALES_ALONE, train_here, usual_options
from test_train import same

from fairseq_gradinit.scales.file import SCALES_FILE

QUICK = ["--gradinit", "--gradinit-iterations", "2", "--max-update", "1", *SCALES_ALONE]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gradinit-gamma 0", "gamma must be a number greater than 0"),
        ("--gradinit-max-tokens 10", "raise --gradinit-max-tokens (now 10)"),
        ("--gradinit-eta 1e38", "lower eta, the learning rate of the s"),
        ("--gradinit-scales /dev/null", "/dev/null is not valid JSON"),
        ("--criterion no_sample_size", "criterion NoSampleSize returned None as its sample size"),
        ("--criterion nan_loss", "the loss is nan in GradInit iteration 1, and 11 batches are mo"),
        ("--task task_with_its_own_optimizer_steps", "train_step uses the optimizer's zero_grad"),
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


def test_a_scales_file_of_other_sizes_and_of_another_model(corpus, tmp_path):
    assert train_here(corpus.translation, tmp_path, *QUICK, "--no-save").code == 0
    usual = [*QUICK, "--no-save", "--gradinit-scales", tmp_path / SCALES_FILE]
    narrow = train_here(corpus.translation, tmp_path / "a", *usual, "--encoder-ffn-embed-dim", "8")
    assert narrow.lines(
        "these scales were learned at other sizes: encoder.layers.0.fc1.weight [32, 16], here "
        "[8, 16]; encoder.layers.0.fc1.bias [32], here [8]; "
    )
    error = train_here(corpus.translation, tmp_path / "b", *usual, "--decoder-layers", "2").error()
    assert "the scales were learned for another model" in error
    assert "decoder.layers.1.self_attn.k_proj.weight is not in the file" in error


def test_a_save_dir_that_cannot_be_written(corpus, tmp_path):
    run = train_here(corpus.translation, __file__, *QUICK)
    assert f"cannot write to --save-dir {__file__}: " in run.error()
    assert run.trainer is None
