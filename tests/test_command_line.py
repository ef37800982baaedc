"""fairseq's programs: by their functions in this process, and once as a user starts them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import GRADINIT, PLUGIN, Outcome, run_command, run_here, train, train_here

from fairseq_gradinit.scales.file import SCALES_FILE, Scales

# What a user of stock fairseq has to set on torch >= 2.6, where it cannot read its own files.
STOCK_LOADS = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
ARCHITECTURE = ["--arch=transformer_gradinit_tiny", "--encoder-layers=1", "--decoder-layers=1"]


def require_gradinit_and_training(run: Outcome, save_dir: Path) -> None:
    assert run.code == 0, run.output
    assert len(run.lines("gradinit: ")) >= 3
    assert run.lines("signature: gradinit:")
    assert len(run.updates) == 4
    assert len(Scales.load(save_dir / SCALES_FILE).history) == 3


@pytest.mark.slow
def test_the_programs_read_a_checkpoint_of_our_architecture(corpus, tmp_path):
    run = train_here(corpus.translation, tmp_path, *GRADINIT, *ARCHITECTURE)
    require_gradinit_and_training(run, tmp_path)
    common = [*PLUGIN, "--path", tmp_path / "checkpoint_last.pt", "--cpu", "--max-len-b", "12"]
    for program, options, lines in (
        ("fairseq-generate", ["--gen-subset", "valid"], 40),
        ("fairseq-interactive", ["-s", "de", "-t", "en"], 2),
    ):
        words = [corpus.translation, *common, *options]
        outcome = run_here(program, *words, stdin="w1 w2 w3\nw4 w5\n")
        assert outcome.code == 0, outcome.output
        assert sum(line.startswith("H-") for line in outcome.output.splitlines()) == lines


@pytest.mark.slow
def test_the_program_itself_and_a_fairseq_without_the_plugin_that_reads_the_checkpoint(
    corpus, tmp_path
):
    run = train(corpus.translation, tmp_path, *PLUGIN, *GRADINIT, *ARCHITECTURE)
    require_gradinit_and_training(run, tmp_path)
    options = ["--path", tmp_path / "checkpoint_last.pt", "--gen-subset", "valid", "--cpu"]
    stock = run_command("fairseq-generate", corpus.translation, *options, **STOCK_LOADS)
    assert stock.code == 0, stock.output
    assert sum(line.startswith("H-") for line in stock.output.splitlines()) == 40
    assert "gradinit" not in stock.output.replace("'gradinit", "").replace(str(tmp_path), "")
    mistaken = train(corpus.translation, tmp_path / "mistaken", *PLUGIN, "--gradinit-eta", "1")
    assert mistaken.code == 1
    expected = "--gradinit-eta was given without --gradinit: add --gradinit, or leave it out"
    assert mistaken.error() == expected
    assert not (tmp_path / "mistaken").exists()
