"""`--init-scheme`: each of the schemes through fairseq-train, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import GRADINIT, PLUGIN, SCALES_ALONE, Training, run_here, train_here
from test_options import configuration
from test_tasks import TASKS, USUAL

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.schemes.options import SCHEMES, read_scheme


def require_applied(name: str, run: Training) -> None:
    """What each of the schemes shows in a trained model."""
    model = run.trainer.get_model()
    if name == "pre-ln":
        assert model.encoder.layers[0].normalize_before
        assert model.decoder.layers[0].normalize_before
    elif name == "zero-branches":
        last = "decoder.layers.0.encoder_attn.out_proj.weight"
        assert run.initial[last].any()
        assert not run.first[last].any()
        assert run.weights[last].any()
    elif name == "deepnorm":
        assert model.encoder.layers[0].shortcuts.ffn != 1.0
        assert not [n for n in run.first if "shortcuts" in n]
    elif name == "t-fixup":
        assert not [n for n in run.weights if "norm" in n]
    else:
        (line,) = run.lines("omega of the decoder's ")
        logged = [float(word) for word in line.rpartition(": ")[2].split()]
        shortcuts = [n for n in run.first if "decoder" in n and "shortcuts" in n]
        for omega, n in zip(logged, shortcuts, strict=True):
            assert run.first[n].tolist() == [pytest.approx(omega, rel=0.01)] * 16
            assert not torch.equal(run.weights[n], run.first[n])
        assert logged == sorted(logged)
        assert logged[0] == 1.0 < logged[-1]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_trains_without_warmup_and_is_not_applied_again_when_resumed(
    corpus, tmp_path, name
):
    options = ("--init-scheme", name, "--warmup-updates", "0")
    first = train_here(corpus.translation, tmp_path, *options, "--max-update", "2")
    assert first.code == 0, first.output
    assert len(first.updates) == 2
    require_applied(name, first)
    second = train_here(corpus.translation, tmp_path, *options, "--max-update", "3")
    assert second.code == 0, second.output
    assert len(second.updates) == 1
    assert second.first.keys() == first.weights.keys()
    assert all(torch.equal(second.first[key], first.weights[key]) for key in first.weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_in_half_precision_as_a_language_model_and_in_translation(corpus, tmp_path, name):
    def trained(*options: str, data=corpus.translation, base=()) -> Training:
        words = ["--init-scheme", name, *options, "--max-update", "2"]
        run = train_here(data, tmp_path, *words, base=base)
        assert run.code == 0, run.output
        return run

    half = trained("--memory-efficient-fp16", "--no-save").weights.values()
    assert {tensor.dtype for tensor in half} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in half)
    if name != "t-fixup":
        task, training = TASKS["language model"]
        words = ["--task", *task, *training, "--no-save"]
        trained(*words, data=corpus.language_model, base=USUAL)
    trained()
    options = ["--path", tmp_path / "checkpoint_last.pt", "--gen-subset", "valid", "--cpu"]
    outcome = run_here("fairseq-generate", corpus.translation, *PLUGIN, *options)
    assert outcome.code == 0, outcome.output
    assert sum(line.startswith("H-") for line in outcome.output.splitlines()) == 40


def test_copies_of_the_weights_are_made_of_those_a_scheme_leaves(corpus, tmp_path):
    """The fp32 copies of training in fp16, and the moving average."""
    options = ("--fp16", "--fp16-no-flatten-grads", "--store-ema", "--max-update", "1", "--no-save")
    done = train_here(corpus.translation, tmp_path, "--init-scheme", "zero-branches", *options)
    assert done.code == 0, done.output
    average = done.trainer.ema.get_model().encoder.layers[0].fc2.weight
    # One step of Adam is as long as the learning rate.
    for weight in (done.weights["encoder.layers.0.fc2.weight"], average):
        assert weight.abs().max() <= 1.1e-3


def test_gradinit_learns_the_scales_of_a_pre_ln_model(corpus, tmp_path):
    options = (*GRADINIT, *SCALES_ALONE, "--max-update", "1", "--no-save")
    done = train_here(corpus.translation, tmp_path, "--init-scheme", "pre-ln", *options)
    assert done.code == 0, done.output
    assert done.trainer.get_model().encoder.layer_norm is not None
    assert len(done.lines("| gradinit: ")) == 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("admin", [], "--init-scheme admin and --gradinit both set the scale of the initial w"),
        ("zero-branches", ["--ddp-backend", "slowmo"], "does not work with --ddp-backend slowmo"),
        ("deepnorm", ["--encoder-normalize-before"], "is for post-LN models, and this encoder"),
        (
            "t-fixup",
            ["--task", "language_modeling", "--arch", "transformer_lm"],
            "(--arch transformer...), and --arch transformer_lm is another model",
        ),
    ],
)
def test_runs_that_a_scheme_does_not_fit_are_refused(name, options, message):
    cfg = configuration("--init-scheme", name, *options, gradinit=not options)
    read = lambda: read_scheme(cfg) and SCHEMES[name].configure(cfg.model)  # noqa: E731
    with pytest.raises(GradInitError) as error:
        read()
    assert message in str(error.value)
