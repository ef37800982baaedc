"""fairseq-hydra-train with options on its command line, and with all of them in a file."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path

import fairseq
import fairseq_cli.hydra_train as program
import pytest
import yaml
from conftest import OWN_USER_DIR, PLUGIN, ROOT, Outcome, run_command, run_here
from fairseq import distributed_utils
from fairseq.dataclass.initialize import hydra_init
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fairseq_gradinit import __version__
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin import hook
from fairseq_gradinit.plugin.options import GradInitOptions, read_options
from fairseq_gradinit.plugin.plan import Plan, make_plan
from fairseq_gradinit.plugin.safe_loading import read_checkpoint
from fairseq_gradinit.plugin.schemes.options import read_scheme

MODEL = {"layers": 2, "embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 2}
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
COMMON = {"user_dir": "fairseq_gradinit", "cpu": True, "log_format": "simple", "log_interval": 1}


def configuration(data: Path, save_dir: Path, **common: object) -> dict:
    task = {"_name": "language_modeling", "data": str(data), "tokens_per_sample": 16}
    task |= {"gradinit": True, "gradinit_iterations": 3, "gradinit_norm_gains": "learned"}
    model = {f"decoder_{name}": size for name, size in MODEL.items()}
    return {
        "task": task,
        "model": {"_name": "transformer_lm", **model},
        "common": {**COMMON, **common},
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


def hydra(*arguments: str, folder: Path, cwd: Path | str = "/") -> Outcome:
    words = [f"hydra.run.dir={folder}", *arguments]
    return run_command("fairseq-hydra-train", *words, cwd=cwd)


def in_a_file(task: str, folder: Path, defaults: bool = False) -> tuple[Path, list[str]]:
    """The folder of a configuration, and what a command line adds: here all is in a file."""
    text = yaml.safe_dump({**REST, "checkpoint": {"save_dir": str(folder)}, "common": COMMON})
    lines = task.splitlines() if defaults else ["_name: translation", *task.splitlines()]
    text = f"{text}task:\n" + "".join(f"  {line}\n" for line in lines)
    begin = "defaults:\n- task: translation\n- _self_" if defaults else "# @package _group_"
    (folder / "run.yaml").write_text(f"{begin}\n{text}")
    return folder, []


def in_a_file_with_a_list_of_defaults(task: str, folder: Path) -> tuple[Path, list[str]]:
    """Here hydra itself puts the task's configuration together, with its types."""
    return in_a_file(task, folder, defaults=True)


def on_the_command_line(task: str, folder: Path) -> tuple[Path, list[str]]:
    rest = overrides({**REST, "checkpoint": {"save_dir": str(folder)}, "common": COMMON})
    pairs = (line.split(": ", 1) for line in task.splitlines())
    given = [f"task.{name}={value}" for name, value in pairs]
    return Path(fairseq.__file__).parent / "config", [*rest, "task=translation", *given]


@pytest.fixture
def composed(monkeypatch, tmp_path):
    """A function that has fairseq-hydra-train read options, in this process; the plan it makes."""

    def composed(task: str, way=in_a_file) -> Plan | None:
        seen = []
        checked = hook._with_checks(lambda cfg, main: seen.append(cfg))
        monkeypatch.setattr(distributed_utils, "call_main", checked)
        monkeypatch.setattr(program, "add_defaults", program.add_defaults)
        folder, words = way(task, tmp_path)
        monkeypatch.setattr(sys, "argv", ["fairseq-hydra-train", *words])
        name = "config" if words else "run"
        hydra_init(name)
        # It has our hydra plugin change the program.
        with initialize_config_dir(str(folder), version_base="1.1"):
            program._hydra_main(compose(name, overrides=words))
        (cfg,) = seen
        assert read_scheme(cfg) is None
        return make_plan(cfg)

    return composed


WAYS = pytest.mark.parametrize(
    "way", [in_a_file, in_a_file_with_a_list_of_defaults, on_the_command_line]
)


@WAYS
def test_values_are_read_as_a_person_writes_them(composed, way):
    values = ("centering: off", "norm_gains: true", "betas: [0.8, 0.95]", "gamma: 1e3", "eta: 1")
    plan = composed("gradinit: true\n" + "\n".join(f"gradinit_{value}" for value in values), way)
    assert plan.centering is False
    assert (plan.config.norm_gains, plan.config.betas) == ("learned", (0.8, 0.95))
    assert (plan.config.gamma, plan.config.eta) == (1000.0, 1.0)


@pytest.mark.parametrize(
    "written", ["gradinit_precision: true", "gradinit_iterations: many", "gradinit_lr: ${x.y}"]
)
@WAYS
def test_a_wrong_value_is_answered_by_one_sentence(composed, caplog, way, written):
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as leaving:
        composed(f"gradinit: true\n{written}", way)
    assert leaving.value.code == 1
    (message,) = [r.getMessage() for r in caplog.records if r.name == "fairseq_gradinit"]
    assert message.startswith(f"GradInit: --{written.partition(':')[0].replace('_', '-')} ")


def test_a_misspelt_option_is_answered_by_a_sentence(composed, caplog):
    for written, sentence in {
        "gradinit_centring: on": "no option gradinit_centring: did you mean gradinit_centering?",
        f"gradinit_{'z' * 50}: on": f"no option gradinit_{'z' * 50}",
    }.items():
        with caplog.at_level(logging.ERROR), pytest.raises(SystemExit):
            composed(written)
        assert caplog.records[-1].getMessage() == f"GradInit: there is {sentence}"


def options_of(text: str) -> GradInitOptions:
    """What is read out of a task's configuration with these lines of YAML in it."""
    kind = TASK_DATACLASS_REGISTRY["translation"]
    return read_options(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(text)))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("gradinit: on", True),
        ("gradinit: 'No'", False),
        ("gradinit: 1", True),
        ("gradinit_centering: on", "on"),
        ("gradinit_centering: no", "off"),
        ("gradinit_centering: 'TRUE'", "on"),
        ("gradinit_norm_gains: off", "fixed"),
        ("gradinit_norm_gains: learned", "learned"),
        ("gradinit_second_order: exact", "exact"),
        ("gradinit_preset: paper", "paper"),
        ("gradinit_betas: '0.8,0.95'", "0.8,0.95"),
        ("gradinit_iterations: 1e1", 10),
        ("gradinit_iterations: '7'", 7),
        ("gradinit_gamma: .inf", math.inf),
        ("gradinit_gamma: inf", math.inf),
        ("gradinit_eta: '1e-3'", 1e-3),
        ("gradinit_max_tokens: null", None),
        ("gradinit_max_skipped: null", 10),
        ("gradinit_scales: s.json", "s.json"),
        ("gradinit_scales: ${data}", "there"),
    ],
    ids=str,
)
def test_a_value_has_the_type_of_its_option(written, meant):
    found = getattr(options_of(f"{written}\ndata: there"), written.partition(":")[0])
    assert (found, type(found)) == (meant, type(meant))


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("gradinit: perhaps", "--gradinit must be true or false, not 'perhaps'"),
        ("gradinit: 2", "--gradinit must be true or false, not 2"),
        ("gradinit_centering: 3", "--gradinit-centering must be one of on, off, not 3"),
        ("gradinit_centering: [off]", "--gradinit-centering must be one of on, off, not [False]"),
        ("gradinit_precision: on", "--gradinit-precision must be one of fp32, bf16, not True"),
        ("gradinit_iterations: 2.5", "--gradinit-iterations must be a whole number, not 2.5"),
        ("gradinit_iterations: .nan", "--gradinit-iterations must be a whole number, not nan"),
        ("gradinit_iterations: true", "--gradinit-iterations must be a whole number, not True"),
        ("gradinit_gamma: off", "--gradinit-gamma must be a number, not False"),
        ("gradinit_lr: {a: 1}", "--gradinit-lr must be a number, not {'a': 1}"),
        ("gradinit_betas: 0.9", "--gradinit-betas must be text, not 0.9"),
        ("gradinit_scales: off", "--gradinit-scales must be text, not False"),
        ("gradinit_lr: ${x.y}", "--gradinit-lr cannot be read from the configuration: Inter"),
        ("gradinit_betas: ['???']", "--gradinit-betas cannot be read from the configuration: Miss"),
    ],
    ids=str,
)
def test_what_is_no_value_of_an_option_is_named(written, sentence):
    with pytest.raises(GradInitError) as error:
        options_of(written)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


# fairseq's hydra changes the folder before it trains: the clone, where the name of the user dir
# is also that of a folder, is the hard case.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cwd", "user_dir", "in_file"),
    [
        *(("/", "fairseq_gradinit", False), (ROOT, "fairseq_gradinit", False)),
        *(("/", OWN_USER_DIR[1], False), (ROOT, "fairseq_gradinit", True)),
    ],
)
def test_a_run_with_its_options_on_the_command_line_or_in_a_file(
    corpus, tmp_path, cwd, user_dir, in_file
):
    document = configuration(corpus.language_model, tmp_path / "save", user_dir=user_dir)
    document["task"] |= {"gradinit_centering": False, "gradinit_betas": [0.8, 0.95]}
    words = overrides(document)
    if in_file:
        (tmp_path / "run.yaml").write_text("# @package _group_\n" + yaml.safe_dump(document))
        words = ["--config-dir", str(tmp_path), "--config-name", "run"]
    outcome = hydra(*words, folder=tmp_path / "hydra", cwd=cwd)
    assert outcome.code == 0, outcome.output
    assert len(outcome.lines("gradinit: ")) >= 3
    for part in (f"signature: gradinit:{__version__}", "norm-gains:learned", "|betas:0.8,0.95|"):
        assert part in outcome.output
    assert "|centering:off|" in outcome.output
    task = read_checkpoint(tmp_path / "save" / "checkpoint_last.pt")["cfg"]["task"]
    assert (task["gradinit"], task["gradinit_iterations"]) == (True, 3)


@pytest.mark.slow
def test_mistakes_and_stock_configurations(corpus, tmp_path):
    """Without our user dir the plugin stays out of hydra's way."""
    document = configuration(corpus.language_model, tmp_path / "save")
    wrong = [*overrides(document), "task.gradinit_centering=3"]
    outcome = hydra(*wrong, folder=tmp_path / "hydra")
    assert outcome.code == 1
    assert "GradInit: --gradinit-centering must be one of on, off, not 3" in outcome.output
    assert "Traceback" not in outcome.output
    del document["common"]["user_dir"], document["task"]["gradinit"]
    outcome = hydra(*overrides(document), folder=tmp_path / "hydra")
    assert outcome.code == 1
    assert "Key 'gradinit_iterations' not in" in outcome.output


@pytest.mark.slow
def test_a_scheme_that_changes_the_architecture(corpus, tmp_path):
    wanted = configuration(corpus.language_model, tmp_path / "checkpoints")
    wanted["task"] = {k: v for k, v in wanted["task"].items() if not k.startswith("gradinit")}
    words = overrides(wanted | {"task": wanted["task"] | {"init_scheme": "admin"}})
    trained = hydra(*words, folder=tmp_path)
    assert trained.code == 0, trained.output
    assert len(trained.updates) == 2
    assert trained.lines("--init-scheme admin applied")
    again = hydra(*words, "optimization.max_update=3", folder=tmp_path)
    assert again.code == 0, again.output
    assert len(again.updates) == 1
    options = [*PLUGIN, "--gen-subset", "valid", "--cpu", "--max-tokens", "400"]
    options += ["--path", tmp_path / "checkpoints" / "checkpoint_last.pt"]
    evaluated = run_here("fairseq-eval-lm", corpus.language_model, *options)
    assert evaluated.lines("Perplexity:"), evaluated.output
