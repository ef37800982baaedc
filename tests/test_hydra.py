"""fairseq-hydra-train with options on its command line, and with all of them in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT, Outcome, run_command

from fairseq_gradinit import __version__

MODEL = {
    "decoder_embed_dim": 32,
    "decoder_ffn_embed_dim": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
}
REST = {
    "criterion": {"_name": "cross_entropy"},
    "optimizer": {"_name": "adam"},
    "lr_scheduler": {"_name": "polynomial_decay", "total_num_update": 100},
    "optimization": {"lr": [0.001], "max_update": 2},
    "dataset": {"batch_size": 16, "disable_validation": True, "num_workers": 0},
    "distributed_training": {"distributed_world_size": 1},
}
COMMON = {
    "user_dir": "fairseq_gradinit",
    "cpu": True,
    "log_format": "simple",
    "log_interval": 1,
}


def configuration(data: Path, save_dir: Path) -> dict:
    task = {"_name": "language_modeling", "data": str(data), "tokens_per_sample": 16}
    task |= {"gradinit": True, "gradinit_iterations": 3, "gradinit_norm_gains": "learned"}
    return {
        "task": task,
        "model": {"_name": "transformer_lm", **MODEL},
        "common": COMMON,
        "checkpoint": {"save_dir": str(save_dir)},
        **REST,
    }


def overrides(configuration: dict) -> list[str]:
    found = []
    for group, values in configuration.items():
        if "_name" in values:
            found.append(f"{group}={values['_name']}")
        for name, value in values.items():
            if name != "_name":
                found.append(f"{group}.{name}={value}")
    return found


def hydra(*arguments: str, folder: Path, cwd: Path | str = "/", real: bool = False) -> Outcome:
    words = [f"hydra.run.dir={folder}", *arguments]
    return run_command("fairseq-hydra-train", *words, cwd=cwd, real=real)


def check(outcome: Outcome, save_dir: Path) -> None:
    assert outcome.code == 0, outcome.output
    assert len(outcome.lines("gradinit: ")) >= 3
    assert f"signature: gradinit:{__version__}" in outcome.output
    assert "norm-gains:learned" in outcome.output
    task = torch.load(save_dir / "checkpoint_last.pt", weights_only=True)["cfg"]["task"]
    assert (task["gradinit"], task["gradinit_iterations"]) == (True, 3)


# fairseq's hydra changes the folder before it trains: the clone, where the name of the user dir
# is also that of a folder, is the hard case.
@pytest.mark.parametrize("cwd", ["/", ROOT])
def test_options_on_the_command_line(corpus, tmp_path, cwd):
    options = overrides(configuration(corpus.language_model, tmp_path / "save"))
    check(hydra(*options, folder=tmp_path / "hydra", cwd=cwd), tmp_path / "save")


def test_options_on_the_command_line_with_a_user_dir_of_ones_own(corpus, tmp_path):
    document = configuration(corpus.language_model, tmp_path)
    document["common"] = {**COMMON, "user_dir": str(ROOT / "tests" / "own_user_dir")}
    check(hydra(*overrides(document), folder=tmp_path / "hydra"), tmp_path)


def test_everything_in_a_file(corpus, tmp_path):
    import yaml

    document = configuration(corpus.language_model, tmp_path / "save")
    (tmp_path / "run.yaml").write_text("# @package _group_\n" + yaml.safe_dump(document))
    options = ["--config-dir", str(tmp_path), "--config-name", "run"]
    check(hydra(*options, folder=tmp_path / "hydra", cwd=ROOT, real=True), tmp_path / "save")


def test_a_mistake_is_one_sentence(corpus, tmp_path):
    options = overrides(configuration(corpus.language_model, tmp_path / "save"))
    outcome = hydra(*options, "task.gradinit_gamma=-1", folder=tmp_path / "hydra")
    assert outcome.code == 1
    assert "GradInit: gamma must be a number greater than 0" in outcome.output
    assert "Traceback" not in outcome.output


def test_stock_configurations_are_composed_as_before(corpus, tmp_path):
    """Without our user dir the plugin stays out of hydra's way."""
    document = configuration(corpus.language_model, tmp_path / "save")
    document["common"] = {k: v for k, v in COMMON.items() if k != "user_dir"}
    del document["task"]["gradinit"]
    outcome = hydra(*overrides(document), folder=tmp_path / "hydra")
    assert outcome.code == 1
    assert "Key 'gradinit_iterations' not in" in outcome.output
