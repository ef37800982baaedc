"""fairseq's programs as a user starts them, from a folder that has nothing to do with us."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import (
    GRADINIT,
    OWN_USER_DIR,
    PLUGIN,
    ROOT,
    Corpus,
    Outcome,
    run_command,
    train,
    usual_options,
)

from fairseq_gradinit.checkpoints import allow_fairseq_checkpoints

# What a user of stock fairseq has to set on torch >= 2.6, where it cannot read its own files.
STOCK_LOADS = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
ARCHITECTURE = ["--arch", "transformer_gradinit_tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("command_line")


@pytest.fixture(scope="module")
def trained(corpus: Corpus, folder: Path) -> Outcome:
    """Our architecture with GradInit; its checkpoint is what the other programs read."""
    return train(corpus.translation, folder / "trained", *PLUGIN, *GRADINIT, *ARCHITECTURE)


@pytest.fixture(scope="module")
def checkpoint(trained: Outcome, folder: Path) -> Path:
    assert trained.code == 0, trained.output
    return folder / "trained" / "checkpoint_last.pt"


def weights(path: Path) -> dict[str, torch.Tensor]:
    allow_fairseq_checkpoints()
    return torch.load(path, weights_only=True)["model"]


def test_training(trained, folder):
    assert trained.code == 0, trained.output
    assert len(trained.lines("| gradinit: ")) == 3
    assert trained.lines("signature: gradinit:")
    assert len(trained.updates) == 4
    document = json.loads((folder / "trained" / "gradinit_scales.json").read_text())
    assert len(document["history"]) == 3


def test_without_gradinit_nothing_changes(corpus, folder):
    stock = train(corpus.translation, folder / "stock")
    plugin = train(corpus.translation, folder / "plugin", *PLUGIN)
    assert stock.code == plugin.code == 0, plugin.output
    assert len(stock.updates) == 4
    assert stock.updates == plugin.updates
    one = weights(folder / "stock" / "checkpoint_last.pt")
    other = weights(folder / "plugin" / "checkpoint_last.pt")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list((folder / "plugin").glob("gradinit*"))


def test_help_shows_the_options_in_a_group_of_their_own():
    outcome = run_command("fairseq-train", *PLUGIN, "--help", COLUMNS="100")
    assert outcome.code == 0
    _, _, group = outcome.output.partition("\nGradInit:\n")
    group = " ".join(group.partition("\n\n")[0].split())
    for text in (
        "--gradinit ",
        "--gradinit-preset {default,paper}",
        "--gradinit-optimizer {auto,adam,adam-eps,sgd,sgd-normalized}",
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


def test_resuming(corpus, folder, checkpoint):
    more = ["--restore-file", checkpoint, "--max-update", "6"]
    resumed = train(
        corpus.translation, folder / "resumed", *PLUGIN, *GRADINIT, *ARCHITECTURE, *more
    )
    assert resumed.code == 0, resumed.output
    assert len(resumed.lines("skipping GradInit")) == 1
    assert len(resumed.updates) == 2


def test_generate(corpus, checkpoint):
    options = ["--path", checkpoint, "--gen-subset", "valid", "--cpu", "--max-len-b", "12"]
    outcome = run_command("fairseq-generate", corpus.translation, *PLUGIN, *options)
    assert outcome.code == 0, outcome.output
    assert len([line for line in outcome.output.splitlines() if line.startswith("H-")]) == 40


def test_interactive(corpus, checkpoint):
    options = ["--path", checkpoint, "--cpu", "--max-len-b", "12"]
    arguments = [corpus.translation, *PLUGIN, *options, "-s", "de", "-t", "en"]
    outcome = run_command("fairseq-interactive", *arguments, stdin="w1 w2 w3\nw4 w5\n")
    assert outcome.code == 0, outcome.output
    assert len([line for line in outcome.output.splitlines() if line.startswith("H-")]) == 2


def test_validate(corpus, checkpoint):
    options = ["--task", "translation", "--path", checkpoint, "--max-tokens", "400", "--cpu"]
    # In the clone, the user dir's name is also that of a folder.
    outcome = run_command("fairseq-validate", corpus.translation, *PLUGIN, *options, cwd=ROOT)
    assert outcome.code == 0, outcome.output
    assert outcome.lines("valid on 'valid' subset")


def test_a_fairseq_without_the_plugin_reads_the_checkpoint(corpus, folder, checkpoint):
    options = ["--path", checkpoint, "--gen-subset", "valid", "--cpu", "--max-len-b", "12"]
    stock = run_command("fairseq-generate", corpus.translation, *options, **STOCK_LOADS)
    assert stock.code == 0, stock.output
    assert "gradinit" not in stock.output.replace("'gradinit", "").replace(str(folder), "")
    assert len([line for line in stock.output.splitlines() if line.startswith("H-")]) == 40


def test_a_user_dir_of_ones_own_brings_the_plugin_along(corpus, folder):
    options = [*OWN_USER_DIR, "--task", "task_registered_later", *GRADINIT]
    outcome = train(corpus.translation, folder / "own", *options, "--max-update", "1")
    assert outcome.code == 0, outcome.output
    assert len(outcome.lines("| gradinit: ")) == 3


def test_language_modelling_on_the_command_line(corpus, folder):
    sizes = [o for o in usual_options() if o.startswith(("--arch", "--encoder-", "--decoder-"))]
    base = [
        *usual_options(*sizes, "--criterion", "--label-smoothing", "--disable-validation"),
        *("--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "16"),
        *("--decoder-layers", "1", "--decoder-embed-dim", "32", "--decoder-attention-heads", "2"),
        *("--criterion", "cross_entropy"),
    ]
    # Otherwise fairseq leaves sentences out.
    whole = ["--required-batch-size-multiple", "1"]
    outcome = train(corpus.language_model, folder / "lm", *PLUGIN, *GRADINIT, *whole, base=base)
    assert outcome.code == 0, outcome.output
    assert len(outcome.lines("| gradinit: ")) == 3
    path = folder / "lm" / "checkpoint_last.pt"
    more = [*PLUGIN, "--path", path, "--gen-subset", "valid", "--cpu", "--max-tokens", "400"]
    more += ["--tokens-per-sample", "16", *whole]
    evaluated = run_command("fairseq-eval-lm", corpus.language_model, *more)
    assert evaluated.code == 0, evaluated.output
    (validation,) = re.findall(r"valid on 'valid' subset .*\| ppl (\S+)", outcome.output)
    (perplexity,) = re.findall(r"Perplexity: (\S+)", evaluated.output)
    assert float(perplexity) == pytest.approx(float(validation), rel=1e-3)
    assert 2 < float(perplexity) < 100


def test_gradinit_needs_the_plugin_to_be_named(corpus, folder):
    outcome = train(corpus.translation, folder / "unnamed", "--gradinit")
    assert outcome.code == 2
    assert "unrecognized arguments: --gradinit" in outcome.output
