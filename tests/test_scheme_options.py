"""`--init-scheme`: each of the schemes through fairseq-train, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    GRADINIT,
    PLUGIN,
    ROOT,
    SCALES_ALONE,
    SMALL_MODEL,
    Training,
    run_here,
    train_here,
    usual_options,
)
from scheme_models import build
from test_options import configuration, parsed

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.schemes.options import SCHEMES, read_scheme

WITH_ARCHITECTURE = ("deepnorm", "t-fixup", "admin")


def require_pre_ln(run: Training) -> None:
    model = run.trainer.get_model()
    assert type(model).__name__ == "TransformerModel"
    assert model.encoder.layers[0].normalize_before
    assert model.decoder.layers[0].normalize_before
    assert {"encoder.layer_norm.weight", "decoder.layer_norm.weight"} <= model.state_dict().keys()


def require_zero_branches(run: Training) -> None:
    name = "decoder.layers.0.encoder_attn.out_proj.weight"
    assert run.initial[name].any()
    assert not run.first[name].any()
    assert run.weights[name].any()


def require_deepnorm(run: Training) -> None:
    model = run.trainer.get_model()
    assert type(model).__name__ == "transformer_deepnorm"
    assert f"{model.encoder.layers[0].fc1.in_features}" in SMALL_MODEL
    constants = dict(model.named_buffers())
    assert constants["encoder.layers.0.shortcuts.ffn"] != 1.0
    assert not [name for name in run.weights if "shortcuts" in name]


def require_t_fixup(run: Training) -> None:
    assert type(run.trainer.get_model()).__name__ == "transformer_t_fixup"
    assert not [name for name in run.weights if "norm" in name]


def require_admin(run: Training) -> None:
    assert type(run.trainer.get_model()).__name__ == "transformer_admin"
    (line,) = run.lines("omega of the decoder's ")
    logged = [float(word) for word in line.rpartition(": ")[2].split()]
    names = [name for name in run.first if name.startswith("decoder") and "shortcuts" in name]
    for omega, name in zip(logged, names, strict=True):
        assert (run.first[name] == run.first[name][0]).all()
        assert run.first[name][0].item() == pytest.approx(omega, rel=0.01)
        assert not torch.equal(run.weights[name], run.first[name])
    assert logged == sorted(logged)
    assert logged[0] == 1.0
    assert logged[-1] > 1.0


REQUIRED = {
    "pre-ln": require_pre_ln,
    "zero-branches": require_zero_branches,
    "deepnorm": require_deepnorm,
    "t-fixup": require_t_fixup,
    "admin": require_admin,
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_trains_without_warmup_and_is_not_applied_again_when_resumed(
    corpus, tmp_path, name
):
    options = ("--init-scheme", name, "--warmup-updates", "0")
    first = train_here(corpus.translation, tmp_path, *options, "--max-update", "2")
    assert first.code == 0, first.output
    assert len(first.updates) == 2
    REQUIRED[name](first)
    second = train_here(corpus.translation, tmp_path, *options, "--max-update", "3")
    assert second.code == 0, second.output
    assert len(second.updates) == 1
    assert second.first.keys() == first.weights.keys()
    assert all(torch.equal(second.first[key], first.weights[key]) for key in first.weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_trains_with_warmup_and_with_sgd(corpus, tmp_path, name):
    base = usual_options("--optimizer", "--adam-betas", "--warmup-updates")
    options = ("--optimizer", "sgd", "--warmup-updates", "2", "--max-update", "2")
    done = train_here(
        corpus.translation, tmp_path, "--init-scheme", name, *options, "--no-save", base=base
    )
    assert done.code == 0, done.output
    assert len(done.updates) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_trains_in_half_precision(corpus, tmp_path, name):
    """Of fairseq's ways of fp16, the one that a CPU takes."""
    options = ("--memory-efficient-fp16", "--max-update", "2", "--no-save")
    done = train_here(corpus.translation, tmp_path, "--init-scheme", name, *options)
    assert done.code == 0, done.output
    assert len(done.updates) == 2
    assert {tensor.dtype for tensor in done.weights.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in done.weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "t-fixup"])
def test_language_models(corpus, tmp_path, name):
    base = [
        *usual_options(*SMALL_MODEL[::2], "--criterion", "--label-smoothing"),
        *("--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "16"),
        *("--decoder-layers", "1", "--decoder-embed-dim", "16", "--decoder-attention-heads", "2"),
        *("--decoder-ffn-embed-dim", "32", "--criterion", "cross_entropy", "--max-update", "2"),
    ]
    done = train_here(
        corpus.language_model, tmp_path, "--init-scheme", name, "--no-save", base=base
    )
    assert done.code == 0, done.output
    assert len(done.updates) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_ARCHITECTURE)
def test_a_checkpoint_of_an_architecture_of_ours_translates(corpus, tmp_path, name):
    trained = train_here(corpus.translation, tmp_path, "--init-scheme", name, "--max-update", "1")
    assert trained.code == 0, trained.output
    outcome = run_here(
        "fairseq-generate",
        *(corpus.translation, *PLUGIN, "--path", tmp_path / "checkpoint_last.pt"),
        *("--gen-subset", "valid", "--cpu", "--max-len-b", "12"),
    )
    assert outcome.code == 0, outcome.output
    assert len([line for line in outcome.output.splitlines() if line.startswith("H-")]) == 40


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
    options = (*SCALES_ALONE, "--max-update", "1", "--no-save")
    done = train_here(corpus.translation, tmp_path, "--init-scheme", "pre-ln", *GRADINIT, *options)
    assert done.code == 0, done.output
    assert done.trainer.get_model().encoder.layer_norm is not None
    assert len(done.lines("| gradinit: ")) == 3


def refusal(*options: str, gradinit: bool = False) -> str:
    with pytest.raises(GradInitError) as error:
        read_scheme(configuration(*options, gradinit=gradinit))
    return str(error.value)


@pytest.mark.parametrize("name", [name for name, found in SCHEMES.items() if found.sets_weights])
def test_gradinit_on_top_is_refused(name):
    assert refusal("--init-scheme", name, gradinit=True) == (
        f"--init-scheme {name} and --gradinit both set the scale of the initial weights, and the "
        "later would undo the earlier: leave one of the two out"
    )


def test_processes_that_train_apart_are_refused():
    message = refusal("--init-scheme", "zero-branches", "--ddp-backend", "slowmo")
    assert message.startswith("--init-scheme zero-branches does not work with --ddp-backend slowmo")


@pytest.mark.parametrize("name", ["metainit", "admin-folded"])
def test_an_unknown_scheme_is_answered_with_those_there_are(name, capsys):
    with pytest.raises(SystemExit):
        parsed("--init-scheme", name)
    message = capsys.readouterr().err
    assert f"invalid choice: '{name}'" in message
    assert all(scheme in message.partition("choose from")[2] for scheme in SCHEMES)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "deepnorm",
            ["--encoder-normalize-before"],
            "is for post-LN models, and this encoder",
        ),
        ("admin", ["--decoder-normalize-before"], "is for post-LN models, and this decoder"),
        ("deepnorm", ["--arch", "lstm"], "--arch lstm is another model"),
        (
            "t-fixup",
            ["--task", "language_modeling", "--arch", "transformer_lm"],
            "(--arch transformer...), and --arch transformer_lm is another model",
        ),
    ],
)
def test_models_without_the_variant_are_refused(name, options, message):
    with pytest.raises(GradInitError) as error:
        SCHEMES[name].configure(configuration(*options, gradinit=False).model)
    assert message in str(error.value)


def test_weights_of_an_architecture_of_ours_do_not_fit_a_stock_model():
    for variant in ("transformer_deepnorm", "transformer_admin", "transformer_t_fixup"):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*shortcuts|Missing key.*norm"):
            build("transformer_iwslt_de_en").load_state_dict(build(variant).state_dict())


def test_the_page_of_other_initialisations_names_the_schemes():
    text = (ROOT / "docs" / "rivals.md").read_text()
    assert all(f"`{name}`" in text for name in SCHEMES)
