"""fairseq-hydra-train with options on its command line, and with all of them in a file."""

from __future__ import annotations

import logging
import math
import sys
from functools import partial
from pathlib import Path

import fairseq
import fairseq_cli.hydra_train as program
import pytest
import yaml
from conftest import OWN_USER_DIR, ROOT, Outcome, run_command
from fairseq import distributed_utils
from fairseq.dataclass.initialize import hydra_init
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin import hook
from fairseq_gradinit.plugin.options import GradInitOptions, read_options
from fairseq_gradinit.plugin.plan import Plan, make_plan
from fairseq_gradinit.plugin.safe_loading import read_checkpoint

REST = {
    "criterion": {"_name": "cross_entropy"},
    "optimizer": {"_name": "adam"},
    "lr_scheduler": {"_name": "polynomial_decay", "total_num_update": 100},
    "optimization": {"lr": [0.001], "max_update": 2},
    # Without the thread that reads ahead, which at times aborts a process that is done.
    "dataset": {
        "batch_size": 16,
        "data_buffer_size": 0,
        "disable_validation": True,
        "num_workers": 0,
    },
    "distributed_training": {"distributed_world_size": 1},
}


def configuration(data: Path, save_dir: Path, options: dict, user_dir="fairseq_gradinit") -> dict:
    task = {"_name": "language_modeling", "data": str(data), "tokens_per_sample": 16}
    sizes = {"layers": 2, "embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 2}
    return {
        "task": task | options,
        "model": {"_name": "transformer_lm", **{f"decoder_{k}": n for k, n in sizes.items()}},
        "common": {"user_dir": user_dir, "cpu": True, "log_format": "simple", "log_interval": 1},
        "checkpoint": {"save_dir": str(save_dir)},
        **REST,
    }


def overrides(configuration: dict) -> list[str]:
    found = []
    for group, values in configuration.items():
        for name, value in values.items():
            found.append(f"{group}={value}" if name == "_name" else f"{group}.{name}={value}")
    return found


def in_a_file(document: dict, folder: Path) -> tuple[Path, str, list[str]]:
    """The folder of a configuration, its name, and what a command line adds."""
    (folder / "run.yaml").write_text("# @package _group_\n" + yaml.safe_dump(document))
    return folder, "run", []


def on_the_command_line(document: dict, folder: Path) -> tuple[Path, str, list[str]]:
    """Here hydra itself puts the task's configuration together, with its types."""
    return Path(fairseq.__file__).parent / "config", "config", overrides(document)


def hydra(*arguments: str, folder: Path, cwd: Path | str = "/") -> Outcome:
    words = [f"hydra.run.dir={folder}", *arguments]
    return run_command("fairseq-hydra-train", *words, cwd=cwd)


@pytest.fixture
def composed(monkeypatch, tmp_path):
    """A function that has fairseq-hydra-train read options, in this process; the plan it makes."""

    def composed(options: dict, way=in_a_file) -> Plan | None:
        seen = []
        checked = partial(hook.check_and_call_main, lambda cfg, main: seen.append(cfg))
        monkeypatch.setattr(distributed_utils, "call_main", checked)
        monkeypatch.setattr(program, "add_defaults", program.add_defaults)
        folder, name, words = way(configuration(tmp_path, tmp_path, options), tmp_path)
        monkeypatch.setattr(sys, "argv", ["fairseq-hydra-train", *words])
        hydra_init(name)
        # It has our hydra plugin change the program.
        with initialize_config_dir(str(folder), version_base="1.1"):
            program._hydra_main(compose(name, overrides=words))
        (cfg,) = seen
        return make_plan(cfg)

    return composed


WAYS = pytest.mark.parametrize("way", [in_a_file, on_the_command_line])


@WAYS
def test_values_are_read_as_a_person_writes_them(composed, way):
    options = {"gradinit": True, "gradinit_centering": False, "gradinit_betas": [0.8, 0.95]}
    plan = composed({**options, "gradinit_gamma": 1e3, "gradinit_eta": 1}, way)
    assert plan.centering is False
    assert (plan.config.betas, plan.config.gamma, plan.config.eta) == ((0.8, 0.95), 1000.0, 1.0)


@WAYS
def test_a_wrong_value_is_answered_by_one_sentence(composed, caplog, way):
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as leaving:
        composed({"gradinit": True, "gradinit_iterations": "many"}, way)
    assert leaving.value.code == 1
    (message,) = [r.getMessage() for r in caplog.records if r.name == "fairseq_gradinit"]
    assert message == "GradInit: --gradinit-iterations must be a whole number, not 'many'"


def options_of(text: str) -> GradInitOptions:
    """What is read out of a task's configuration with these lines of YAML in it."""
    kind = TASK_DATACLASS_REGISTRY["translation"]
    return read_options(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(text)))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("gradinit: on", True),
        ("gradinit_centering: on", "on"),
        ("gradinit_iterations: 1e1", 10),
        ("gradinit_gamma: .inf", math.inf),
        ("gradinit_eta: '1e-3'", 1e-3),
        ("gradinit_max_tokens: null", None),
        ("gradinit_save_interval: null", 10),
        ("gradinit_scales: ${data}", "there"),
    ],
)
def test_a_value_has_the_type_of_its_option(written, meant):
    found = getattr(options_of(f"{written}\ndata: there"), written.partition(":")[0])
    assert (found, type(found)) == (meant, type(meant))


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("gradinit: perhaps", "--gradinit must be true or false, not 'perhaps'"),
        ("gradinit_precision: on", "--gradinit-precision must be one of fp32, bf16, not True"),
        ("gradinit_iterations: 2.5", "--gradinit-iterations must be a whole number, not 2.5"),
        ("gradinit_gamma: off", "--gradinit-gamma must be a number, not False"),
    ],
)
def test_what_is_no_value_of_an_option_is_named(written, sentence):
    with pytest.raises(GradInitError) as error:
        options_of(written)
    assert str(error.value) == sentence


# fairseq's hydra changes the folder before it trains: the clone, where the name of the user dir
# is also that of a folder, is the hard case.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cwd", "user_dir", "way"),
    [("/", OWN_USER_DIR[1], on_the_command_line), (ROOT, "fairseq_gradinit", in_a_file)],
)
def test_a_run_with_its_options_on_the_command_line_or_in_a_file(
    corpus, tmp_path, cwd, user_dir, way
):
    options = {"gradinit": True, "gradinit_iterations": 3, "gradinit_centering": False}
    document = configuration(corpus.language_model, tmp_path / "save", options, user_dir)
    folder, name, words = way(document, tmp_path)
    words += ["--config-dir", str(folder), "--config-name", name]
    outcome = hydra(*words, folder=tmp_path / "hydra", cwd=cwd)
    assert outcome.code == 0, outcome.output
    assert len(outcome.lines("] - gradinit: ")) == 3
    assert "|centering:off|" in outcome.output
    task = read_checkpoint(tmp_path / "save" / "checkpoint_last.pt")["cfg"]["task"]
    assert (task["gradinit"], task["gradinit_iterations"]) == (True, 3)


@pytest.mark.slow
def test_without_our_user_dir_the_plugin_stays_out_of_the_way_of_hydra(corpus, tmp_path):
    document = configuration(corpus.language_model, tmp_path / "save", {"gradinit": True})
    del document["common"]["user_dir"]
    outcome = hydra(*overrides(document), folder=tmp_path / "hydra")
    assert outcome.code == 1
    assert "Key 'gradinit' not in" in outcome.output


@pytest.mark.slow
def test_a_scheme_that_changes_the_architecture(corpus, tmp_path):
    wanted = configuration(corpus.language_model, tmp_path / "save", {"init_scheme": "admin"})
    trained = hydra(*overrides(wanted), folder=tmp_path)
    assert trained.code == 0, trained.output
    assert len(trained.updates) == 2
    assert trained.lines("--init-scheme admin applied")
