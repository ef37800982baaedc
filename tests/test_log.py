"""What a run of GradInit tells: progress, the table of scales, the signature, the trackers."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import GRADINIT, train_here

from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.plugin.log import TAG, IterationLog
from fairseq_gradinit.scales.file import SCALES_FILE, Scales

HERE = [*GRADINIT, "--decoder-layers", "2", "--max-update", "1", "--no-save"]


@pytest.fixture(scope="module")
def told(corpus, tmp_path_factory):
    return train_here(corpus.translation, tmp_path_factory.mktemp("told"), *HERE)


def signature_of(run) -> dict[str, str]:
    (line,) = run.lines("signature: ")
    return dict(part.split(":", 1) for part in line.partition("signature: ")[2].split("|"))


def test_lines_of_iterations(told):
    (line,) = told.lines("GradInit: learning")
    assert "41 of 71 parameter tensors in 3 iterations" in line
    assert "nats" in line
    lines = told.lines("| gradinit: ")
    steps = [re.search(r"gradinit: +(\d+ / \d+) ", line).group(1) for line in lines]
    assert steps == ["1 / 3", "2 / 3", "3 / 3"]
    history = Scales.load(Path(told.trainer.cfg.checkpoint.save_dir, SCALES_FILE)).history
    for line, row in zip(lines, map(vars, history), strict=True):
        columns = dict(re.findall(r"(\w+)=([^,\s]+)", line))
        assert (columns["kind"], columns["gamma"]) == ("objective", "off")
        # A terminal of 80 columns cuts the rest off a progress bar.
        assert list(columns)[:2] == ["trial_loss", "loss"]
        assert float(columns["gnorm"]) == round(row["grad_norm"], 2)
        for name, digits in {"loss": 4, "trial_loss": 4, "min_scale": 3, "max_scale": 3}.items():
            assert float(columns[name]) == round(row[name], digits)


def test_the_table_has_a_row_for_every_kind_and_a_column_for_every_layer(told):
    lines = [line.partition("fairseq_gradinit | ")[2] for line in told.output.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("scales by kind of block"))
    rows = {}
    for line in lines[start + 1 :]:
        if line.startswith("signature"):
            break
        kind, cells = re.split(r"\s{2,}", line)
        rows[kind] = cells
    names = told.initial.keys()
    assert rows.keys() == {re.sub(r"\.\d+\.", ".*.", name) for name in names}
    assert re.fullmatch(r"\d\.\d\d \d\.\d\d", rows["decoder.layers.*.fc1.weight"])
    assert rows["encoder.layers.*.fc1.weight"] == "0.1 (fixed)"
    assert re.fullmatch(r"\d\.\d\d", rows["encoder.embed_tokens.weight"])
    assert rows["decoder.layers.*.final_layer_norm.weight"] == "1 (norm gain)"
    assert rows["decoder.layers.*.final_layer_norm.bias"] == "1 (centered)"
    assert rows["decoder.layers.*.self_attn.out_proj.bias"] == "1 (zero)"


def test_the_signature_names_what_decides_the_result(told, corpus, tmp_path):
    signature = signature_of(told)
    assert signature.items() >= {
        *(("preset", "default"), ("optimizer", "adam"), ("eta", "0.001"), ("gamma", "off")),
        *(("iterations", "3"), ("tokens", "600"), ("seed", "1"), ("precision", "fp32")),
        *(("task", "translation"), ("criterion", "label_smoothed_cross_entropy")),
    }
    other = train_here(corpus.translation, tmp_path, *HERE, "--seed", "2")
    differs = {name for name, value in signature_of(other).items() if value != signature[name]}
    assert differs == {"seed", "model", "data"}


@pytest.fixture
def write_log(told, tmp_path):
    """Writes 40 iterations as a run with some logging options does."""

    def write(**common):
        cfg = copy.deepcopy(told.trainer.cfg)
        for name, value in common.items():
            cfg.common[name] = value
        log = IterationLog(cfg, GradInitConfig(eta=1e-3, iterations=40), tracked=True)
        for index in range(1, 41):
            log.write(Iteration(index, "objective", 5.25, 4.125, 1e3, 0.9, 1.1))

    return write


@pytest.mark.parametrize("format_", ["json", "none", "tqdm"])
def test_every_log_format(write_log, caplog, format_):
    caplog.set_level("INFO")
    write_log(log_format=format_)
    found = [record.message for record in caplog.records if record.name == "gradinit"]
    if format_ == "json":
        assert [json.loads(line)["kind"] for line in found] == ["objective"] * 20
    if format_ == "none":
        assert not found


class Trackers:
    """What fairseq hands to its three trackers, none of which is installed."""

    def __init__(self, monkeypatch) -> None:
        from fairseq.logging import progress_bar

        self.tensorboard: list[tuple] = []
        self.aim: list[tuple] = []
        self.wandb: list[tuple] = []
        self.begun: list[dict] = []
        trackers = self

        class Writer:
            def __init__(self, folder):
                self.tag = folder.rpartition("/")[2]

            def add_scalar(self, key, value, step):
                trackers.tensorboard.append((self.tag, key, step))

            def add_text(self, *_): ...
            def flush(self): ...
            def close(self): ...

        class Run:
            def track(self, value, name, step, context):
                trackers.aim.append((context["tag"], name, value, step))

            def set(self, key, value, strict): ...

        wandb = SimpleNamespace(
            init=lambda **options: self.begun.append(options),
            log=lambda values, step: self.wandb.append((step, values)),
            config=SimpleNamespace(update=lambda *_, **__: None),
            run=SimpleNamespace(name="a run"),
        )
        monkeypatch.setattr(progress_bar, "SummaryWriter", Writer)
        monkeypatch.setattr(progress_bar, "_tensorboard_writers", {})
        monkeypatch.setattr(progress_bar, "get_aim_run", lambda repo, run_hash: Run())
        monkeypatch.setattr(progress_bar, "wandb", wandb)


def test_trackers_get_the_iterations(write_log, tmp_path, monkeypatch):
    """Each second of 40 iterations."""
    trackers = Trackers(monkeypatch)
    write_log(
        tensorboard_logdir=str(tmp_path / "tb"),
        **{"aim_repo": str(tmp_path / "aim"), "aim_run_hash": "abc", "wandb_project": "p"},
    )
    shown = list(range(2, 41, 2))
    for key in ("loss", "trial_loss", "gnorm", "min_scale", "max_scale"):
        steps = [step for tag, name, step in trackers.tensorboard if (tag, name) == (TAG, key)]
        assert steps == shown
    ours = [(name, value, step) for tag, name, value, step in trackers.aim if tag == TAG]
    assert [step for name, _, step in ours if name == "trial_loss"] == shown
    logged = [values for _, values in trackers.wandb]
    found = [row["gradinit/iteration"] for row in logged if "gradinit/iteration" in row]
    assert found == shown
    steps = [step for step, row in trackers.wandb if any(key.startswith(TAG) for key in row)]
    assert steps == sorted(steps)
    assert steps[-1] <= 20
    assert {options["project"] for options in trackers.begun} == {"p"}
    assert len({options["name"] for options in trackers.begun}) == 1
