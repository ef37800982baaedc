"""What a run of GradInit tells: progress, the table of scales, the signature, TensorBoard."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from conftest import GRADINIT, train_here
from fairseq.logging import progress_bar

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
    (last,) = Scales.load(Path(told.trainer.cfg.checkpoint.save_dir, SCALES_FILE)).history[-1:]
    columns = dict(re.findall(r"(\w+)=([^,\s]+)", lines[-1]))
    # A terminal of 80 columns cuts the rest off a progress bar.
    assert list(columns)[:2] == ["trial_loss", "loss"]
    assert (columns["kind"], columns["gamma"]) == ("objective", "off")
    assert float(columns["gnorm"]) == round(last.grad_norm, 2)
    for name, digits in {"loss": 4, "trial_loss": 4, "min_scale": 3, "max_scale": 3}.items():
        assert float(columns[name]) == round(getattr(last, name), digits)


def test_the_table_has_a_row_for_every_kind_and_a_column_for_every_layer(told):
    lines = [line.partition("fairseq_gradinit | ")[2] for line in told.output.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("scales by kind of block"))
    rows = {}
    for line in lines[start + 1 :]:
        if line.startswith("signature"):
            break
        kind, cells = re.split(r"\s{2,}", line)
        rows[kind] = cells
    assert rows.keys() == {re.sub(r"\.\d+\.", ".*.", name) for name in told.initial}
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


@pytest.mark.parametrize("format_", ["json", "none", "tqdm"])
def test_every_second_of_40_iterations_in_every_log_format_and_in_tensorboard(
    format_, told, tmp_path, caplog, monkeypatch
):
    written = []

    class Writer:
        """Stands for TensorBoard's, which is not installed."""

        def __init__(self, folder):
            self.tag = Path(folder).name

        def add_scalar(self, key, value, step):
            written.append((self.tag, key, step))

        def add_text(self, *_): ...

        def flush(self): ...

    monkeypatch.setattr(progress_bar, "SummaryWriter", Writer)
    monkeypatch.setattr(progress_bar, "_tensorboard_writers", {})
    caplog.set_level("INFO")
    cfg = copy.deepcopy(told.trainer.cfg)
    cfg.common.log_format, cfg.common.tensorboard_logdir = format_, str(tmp_path)
    log = IterationLog(cfg, GradInitConfig(eta=1e-3, iterations=40), tracked=True)
    for index in range(1, 41):
        log.write(Iteration(index, "objective", 5.25, 4.125, 1e3, 0.9, 1.1))
    found = [record.message for record in caplog.records if record.name == TAG]
    if format_ == "json":
        assert [json.loads(line)["kind"] for line in found] == ["objective"] * 20
    assert (format_ == "none") == (not found)
    for key in ("loss", "trial_loss", "gnorm", "min_scale", "max_scale"):
        steps = [step for tag, name, step in written if (tag, name) == (TAG, key)]
        assert steps == list(range(2, 41, 2))
