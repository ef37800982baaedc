"""fairseq's programs: by their functions in this process, and once as a user starts them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import (
    GRADINIT,
    PLUGIN,
    Corpus,
    Outcome,
    Training,
    run_command,
    run_here,
    train,
    train_here,
    usual_options,
)

# What a user of stock fairseq has to set on torch >= 2.6, where it cannot read its own files.
STOCK_LOADS = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
ARCHITECTURE = ["--arch", "transformer_gradinit_tiny", "--encoder-layers", "1"]


def hypotheses(outcome: Outcome) -> list[str]:
    assert outcome.code == 0, outcome.output
    return [line for line in outcome.output.splitlines() if line.startswith("H-")]


def require_gradinit_and_training(run: Outcome, save_dir: Path) -> None:
    assert run.code == 0, run.output
    assert len(run.lines("gradinit: ")) >= 3
    assert run.lines("signature: gradinit:")
    assert len(run.updates) == 4
    document = json.loads((save_dir / "gradinit_scales.json").read_text())
    assert len(document["history"]) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("command_line")


@pytest.fixture(scope="module")
def trained(corpus: Corpus, folder: Path) -> Training:
    """Our architecture with GradInit; its checkpoint is what the other programs read."""
    return train_here(corpus.translation, folder, *GRADINIT, *ARCHITECTURE)


@pytest.fixture(scope="module")
def checkpoint(trained: Training, folder: Path) -> Path:
    assert trained.code == 0, trained.output
    return folder / "checkpoint_last.pt"


def test_training(trained, folder):
    require_gradinit_and_training(trained, folder)


def test_resuming(corpus, checkpoint, tmp_path):
    more = ["--restore-file", checkpoint, "--max-update", "6"]
    resumed = train_here(corpus.translation, tmp_path, *GRADINIT, *ARCHITECTURE, *more)
    assert resumed.code == 0, resumed.output
    assert len(resumed.lines("skipping GradInit")) == 1
    assert len(resumed.updates) == 2


def test_generate(corpus, checkpoint):
    options = ["--path", checkpoint, "--gen-subset", "valid", "--cpu", "--max-len-b", "12"]
    outcome = run_here("fairseq-generate", corpus.translation, *PLUGIN, *options)
    assert len(hypotheses(outcome)) == 40


def test_interactive(corpus, checkpoint):
    options = ["--path", checkpoint, "--cpu", "--max-len-b", "12", "-s", "de", "-t", "en"]
    outcome = run_here(
        "fairseq-interactive", corpus.translation, *PLUGIN, *options, stdin="w1 w2 w3\nw4 w5\n"
    )
    assert len(hypotheses(outcome)) == 2


def test_validate(corpus, checkpoint):
    options = ["--task", "translation", "--path", checkpoint, "--max-tokens", "400", "--cpu"]
    outcome = run_here("fairseq-validate", corpus.translation, *PLUGIN, *options)
    assert outcome.code == 0, outcome.output
    assert outcome.lines("valid on 'valid' subset")


def test_evaluation_of_a_language_model(corpus, tmp_path):
    sizes = [o for o in usual_options() if o.startswith(("--arch", "--encoder-", "--decoder-"))]
    base = [
        *usual_options(*sizes, "--criterion", "--label-smoothing", "--disable-validation"),
        *("--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "16"),
        *("--decoder-layers", "1", "--decoder-embed-dim", "32", "--decoder-attention-heads", "2"),
        *("--criterion", "cross_entropy"),
    ]
    # Otherwise fairseq leaves sentences out.
    whole = ["--required-batch-size-multiple", "1"]
    run = train_here(corpus.language_model, tmp_path, *GRADINIT, *whole, base=base)
    require_gradinit_and_training(run, tmp_path)
    path = tmp_path / "checkpoint_last.pt"
    more = [*PLUGIN, "--path", path, "--gen-subset", "valid", "--cpu", "--max-tokens", "400"]
    more += ["--tokens-per-sample", "16", *whole]
    evaluated = run_here("fairseq-eval-lm", corpus.language_model, *more)
    assert evaluated.code == 0, evaluated.output
    (validation,) = re.findall(r"valid on 'valid' subset .*\| ppl (\S+)", run.output)
    (perplexity,) = re.findall(r"Perplexity: (\S+)", evaluated.output)
    assert float(perplexity) == pytest.approx(float(validation), rel=1e-3)
    assert 2 < float(perplexity) < 100


def test_help_shows_the_options_in_a_group_of_their_own(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    outcome = run_here("fairseq-train", *PLUGIN, "--help")
    assert outcome.code == 0
    _, _, group = outcome.output.partition("\nGradInit:\n")
    group = " ".join(group.partition("\n\n")[0].split())
    for text in (
        "--gradinit ",
        "--gradinit-preset {default,paper}",
        "--gradinit-optimizer {auto,adam,sgd,sgd-normalized}",
        "--gradinit-norm-gains {fixed,learned}",
        "number of scale updates (default: 60; preset paper: 780)",
        "1 + momentum (default: the run's peak --lr; preset paper: 0.001)",
        "in nats per unit of weight (l1 for adam, l2 for sgd); inf switches the constraint off "
        "(default: inf; preset paper: 1000.0)",
        "lower bound of a scale (default: 0.2; preset paper: 0.01)",
        "tokens in a GradInit batch",
        "(default: 1.5 times the run's --max-tokens; preset paper: 6000)",
        "as '0.9,0.98' (default: (0.9, 0.98))",
        "--gradinit-scales GRADINIT_SCALES",
    ):
        assert text in group


@pytest.mark.slow
def test_the_programs_and_a_fairseq_without_the_plugin_that_reads_the_checkpoint(corpus, tmp_path):
    run = train(corpus.translation, tmp_path, *PLUGIN, *GRADINIT, *ARCHITECTURE)
    require_gradinit_and_training(run, tmp_path)
    options = ["--path", tmp_path / "checkpoint_last.pt", "--gen-subset", "valid", "--cpu"]
    stock = run_command(
        "fairseq-generate", corpus.translation, *options, "--max-len-b", "12", **STOCK_LOADS
    )
    assert len(hypotheses(stock)) == 40
    assert "gradinit" not in stock.output.replace("'gradinit", "").replace(str(tmp_path), "")
