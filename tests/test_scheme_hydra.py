"""A scheme that changes the architecture, under fairseq-hydra-train."""

from __future__ import annotations

import pytest
from conftest import PLUGIN, run_command
from test_hydra import configuration, hydra, overrides


@pytest.mark.slow
def test_a_model_trained_there_is_evaluated(corpus, tmp_path):
    wanted = configuration(corpus.language_model, tmp_path / "checkpoints")
    wanted["task"] = {k: v for k, v in wanted["task"].items() if not k.startswith("gradinit")}
    wanted["task"]["init_scheme"] = "admin"
    trained = hydra(*overrides(wanted), folder=tmp_path)
    assert trained.code == 0, trained.output
    assert len(trained.updates) == 2
    assert trained.lines("--init-scheme admin applied")
    again = hydra(*overrides(wanted), "optimization.max_update=3", folder=tmp_path)
    assert again.code == 0, again.output
    assert len(again.updates) == 1
    evaluated = run_command(
        "fairseq-eval-lm",
        *(corpus.language_model, *PLUGIN, "--gen-subset", "valid", "--cpu"),
        *("--path", tmp_path / "checkpoints" / "checkpoint_last.pt", "--max-tokens", "400"),
    )
    assert evaluated.code == 0, evaluated.output
    assert evaluated.lines("Perplexity:")
