"""`--init-scheme`: each of the schemes through fairseq-train, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import GRADINIT, PLUGIN, ROOT, SMALL_MODEL, run_command, train_here, usual_options

from fairseq_gradinit.schemes.metainit import MetaInitConfig
from fairseq_gradinit.schemes.options import SCHEMES

SHORT = {"metainit": ["--init-scheme-iterations", "2"]}
"""Options that make a scheme short."""


def scheme(name: str) -> list[str]:
    return ["--init-scheme", name, *SHORT.get(name, [])]


@pytest.mark.parametrize("name", SCHEMES)
def test_it_trains_without_warmup_and_is_not_applied_again_when_resumed(corpus, tmp_path, name):
    options = (*scheme(name), "--warmup-updates", "0")
    first = train_here(corpus.translation, tmp_path, *options)
    assert first.code == 0, first.output
    assert len(first.updates) == 4
    second = train_here(corpus.translation, tmp_path, *options, "--max-update", "6")
    assert second.code == 0, second.output
    assert len(second.updates) == 2
    assert second.first.keys() == first.weights.keys()
    assert all(torch.equal(second.first[key], first.weights[key]) for key in first.weights)
    loss = [float(line.split("loss=")[1].split(",")[0].split()[0]) for line in first.updates]
    assert all(0.0 < value < 20.0 for value in loss)


@pytest.mark.parametrize("name", SCHEMES)
def test_it_trains_with_warmup_and_with_sgd(corpus, tmp_path, name):
    base = usual_options("--optimizer", "--adam-betas", "--warmup-updates")
    options = ("--optimizer", "sgd", "--warmup-updates", "2", "--max-update", "2")
    done = train_here(corpus.translation, tmp_path, *scheme(name), *options, base=base)
    assert done.code == 0, done.output
    assert len(done.updates) == 2


@pytest.mark.parametrize("name", SCHEMES)
def test_it_trains_in_half_precision(corpus, tmp_path, name):
    """Of fairseq's ways of fp16, the one that a CPU takes."""
    options = ("--memory-efficient-fp16", "--max-update", "2", "--no-save")
    done = train_here(corpus.translation, tmp_path, *scheme(name), *options)
    assert done.code == 0, done.output
    assert len(done.updates) == 2
    assert {tensor.dtype for tensor in done.weights.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in done.weights.values())


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "t-fixup"])
def test_language_models(corpus, tmp_path, name):
    base = [
        *usual_options(*SMALL_MODEL[::2], "--criterion", "--label-smoothing"),
        *("--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "16"),
        *("--decoder-layers", "2", "--decoder-embed-dim", "32", "--decoder-attention-heads", "2"),
        *("--decoder-ffn-embed-dim", "64", "--criterion", "cross_entropy", "--max-update", "2"),
    ]
    done = train_here(corpus.language_model, tmp_path, *scheme(name), base=base)
    assert done.code == 0, done.output
    assert len(done.updates) == 2


@pytest.mark.parametrize("name", SCHEMES)
def test_its_checkpoint_translates(corpus, tmp_path, name):
    trained = train_here(corpus.translation, tmp_path, *scheme(name), "--max-update", "1")
    assert trained.code == 0, trained.output
    outcome = run_command(
        "fairseq-generate",
        *(corpus.translation, *PLUGIN, "--path", tmp_path / "checkpoint_last.pt"),
        *("--gen-subset", "valid", "--cpu", "--max-len-b", "12"),
    )
    assert outcome.code == 0, outcome.output
    assert len([line for line in outcome.output.splitlines() if line.startswith("H-")]) == 40


def test_nothing_changes_without_it(corpus, tmp_path):
    plain = train_here(corpus.translation, tmp_path, "--max-update", "1")
    assert type(plain.trainer.get_model()).__name__ == "TransformerModel"
    assert all(torch.equal(plain.initial[key], plain.first[key]) for key in plain.initial)
    assert not plain.lines("--init-scheme")


@pytest.mark.parametrize("name", [name for name, found in SCHEMES.items() if found.sets_weights])
def test_gradinit_on_top_is_refused(corpus, tmp_path, name):
    done = train_here(corpus.translation, tmp_path, *scheme(name), *GRADINIT)
    assert done.error() == (
        f"--init-scheme {name} and --gradinit both set the scale of the initial weights, and the "
        "later would undo the earlier: leave one of the two out"
    )


def test_gradinit_learns_the_scales_of_a_pre_ln_model(corpus, tmp_path):
    done = train_here(corpus.translation, tmp_path, *scheme("pre-ln"), *GRADINIT)
    assert done.code == 0, done.output
    assert done.trainer.get_model().encoder.layer_norm is not None
    assert len(done.lines("| gradinit: ")) == 3


def test_an_unknown_scheme_is_answered_with_those_there_are(corpus, tmp_path):
    done = train_here(corpus.translation, tmp_path, "--init-scheme", "magic")
    assert done.code == 2


def test_processes_that_train_apart_are_refused(corpus, tmp_path):
    done = train_here(
        corpus.translation, tmp_path, *scheme("zero-branches"), "--ddp-backend", "slowmo"
    )
    assert done.error().startswith(
        "--init-scheme zero-branches does not work with --ddp-backend slowmo"
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((), "--init-scheme-iterations is for --init-scheme metainit alone: leave it out"),
        (("--init-scheme", "admin"), "--init-scheme-iterations is for --init-scheme metainit"),
        (("--init-scheme", "metainit"), "--init-scheme-iterations must be at least 1, not 0"),
    ],
)
def test_iterations_that_make_no_sense_are_refused(corpus, tmp_path, options, error):
    done = train_here(corpus.translation, tmp_path, *options, "--init-scheme-iterations", "0")
    assert done.error().startswith(error)


def test_the_readme_and_the_documentation_name_it():
    readme = (ROOT / "README.md").read_text()
    assert "| `--init-scheme` |" in readme
    assert f"| `--init-scheme-iterations` | {MetaInitConfig().iterations} |" in readme
    text = (ROOT / "docs" / "rivals.md").read_text()
    assert all(f"`{name}`" in text for name in SCHEMES)
