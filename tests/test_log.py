"""What a run of GradInit tells: progress, the table of scales, the signature, the trackers."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import train_here

HERE = ["--gradinit", "--gradinit-iterations", "40", "--max-update", "2", "--no-save"]


@pytest.fixture(scope="module")
def told(corpus, tmp_path_factory):
    return train_here(corpus.translation, tmp_path_factory.mktemp("told"), *HERE)


def test_a_line_every_few_iterations(told):
    lines = told.lines("| gradinit: ")
    assert len(lines) == 20
    steps = [int(re.search(r"gradinit: +(\d+) / 40 ", line).group(1)) for line in lines]
    assert steps == list(range(2, 41, 2))
    for line in lines:
        columns = dict(re.findall(r"(\w+)=([^,\s]+)", line))
        assert columns["kind"] == "objective"
        assert columns["gamma"] == "off"
        assert float(columns["gnorm"]) > 0
        assert float(columns["trial_loss"]) < float(columns["loss"])
        assert 0.2 <= float(columns["min_scale"]) <= float(columns["max_scale"]) <= 5


def test_the_beginning_says_what_is_done(told):
    (line,) = told.lines("GradInit: learning")
    assert "47 of 87 parameter tensors in 40 iterations" in line
    assert "nats" in line


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


def signature_of(run) -> dict[str, str]:
    (line,) = run.lines("signature: ")
    fields = line.partition("signature: ")[2].split("|")
    return dict(part.split(":", 1) for part in fields)


def test_the_signature_names_what_decides_the_result(told, corpus, tmp_path):
    signature = signature_of(told)
    assert signature.items() >= {
        ("preset", "default"),
        ("optimizer", "adam"),
        ("eta", "0.001"),
        ("gamma", "off"),
        ("iterations", "40"),
        ("tokens", "600"),
        ("seed", "1"),
        ("task", "translation"),
        ("criterion", "label_smoothed_cross_entropy"),
        ("precision", "fp32"),
        ("device", "cpu"),
    }
    again = train_here(corpus.translation, tmp_path / "again", *HERE)
    assert signature_of(again) == signature
    other = train_here(corpus.translation, tmp_path / "other", *HERE, "--seed", "2")
    differs = {name for name, value in signature_of(other).items() if value != signature[name]}
    assert differs == {"seed", "model", "data"}


@pytest.mark.parametrize("format_", ["json", "none", "tqdm"])
def test_every_log_format(corpus, tmp_path, format_):
    run = train_here(corpus.translation, tmp_path, *HERE, "--log-format", format_)
    assert run.code == 0
    assert run.lines("signature: ")
    found = [line.partition(" | gradinit | ")[2] for line in run.lines(" | gradinit | ")]
    if format_ == "json":
        assert [json.loads(line)["kind"] for line in found] == ["objective"] * 20
    if format_ == "none":
        assert not found


def test_tensorboard(corpus, tmp_path, monkeypatch):
    from fairseq.logging import progress_bar

    written, histograms = [], []

    class Writer:
        def __init__(self, folder):
            self.tag = folder.rpartition("/")[2]

        def add_scalar(self, key, value, step):
            written.append((self.tag, key, value, step))

        def add_histogram(self, key, values, step):
            histograms.append((self.tag, key, list(values), step))

        def add_text(self, *_): ...
        def flush(self): ...
        def close(self): ...

    monkeypatch.setattr(progress_bar, "SummaryWriter", Writer)
    monkeypatch.setattr(progress_bar, "_tensorboard_writers", {})
    run = train_here(corpus.translation, tmp_path, *HERE, "--tensorboard-logdir", tmp_path / "tb")
    assert run.code == 0
    ours = [(key, step) for tag, key, _, step in written if tag == "gradinit"]
    for key in ("loss", "trial_loss", "gnorm", "min_scale", "max_scale"):
        assert [step for k, step in ours if k == key] == list(range(2, 41, 2))
    assert any(tag == "train_inner" for tag, *_ in written)
    assert histograms == [("gradinit", "scales", learned_scales(tmp_path), 40)]


def learned_scales(folder) -> list[float]:
    rows = json.loads((folder / "gradinit_scales.json").read_text())["blocks"]
    return [row["scale"] for row in rows if row["state"] == "learned"]


def test_aim(corpus, tmp_path, monkeypatch):
    from fairseq.logging import progress_bar

    tracked = []

    class Run:
        def track(self, value, name, step, context):
            tracked.append((context["tag"], name, value, step))

        def set(self, key, value, strict): ...

    monkeypatch.setattr(progress_bar, "get_aim_run", lambda repo, run_hash: Run())
    monkeypatch.setitem(sys.modules, "aim", SimpleNamespace(Distribution=list))
    options = ["--aim-repo", tmp_path / "aim", "--aim-run-hash", "abc"]
    run = train_here(corpus.translation, tmp_path, *HERE, *options)
    assert run.code == 0, run.output
    ours = [(name, value, step) for tag, name, value, step in tracked if tag == "gradinit"]
    assert [step for name, _, step in ours if name == "trial_loss"] == list(range(2, 41, 2))
    assert ours[-1] == ("scales", learned_scales(tmp_path), 40)


def test_wandb(corpus, tmp_path, monkeypatch):
    from fairseq.logging import progress_bar

    logged, begun = [], []
    fake = SimpleNamespace(
        init=lambda **options: begun.append(options),
        log=lambda values, step: logged.append((step, values)),
        config=SimpleNamespace(update=lambda *_, **__: None),
        run=SimpleNamespace(name="a run"),
        Histogram=list,
    )
    monkeypatch.setattr(progress_bar, "wandb", fake)
    run = train_here(corpus.translation, tmp_path, *HERE, "--wandb-project", "p")
    assert run.code == 0
    assert {options["project"] for options in begun} == {"p"}
    assert len({options["name"] for options in begun}) == 1
    iterations = [
        values["gradinit/iteration"] for _, values in logged if "gradinit/iteration" in values
    ]
    assert iterations == list(range(2, 41, 2))
    steps = [step for step, values in logged if any(key.startswith("gradinit/") for key in values)]
    assert steps == sorted(steps)
    assert steps[-1] <= 20
    (histogram,) = [values for _, values in logged if "gradinit/scales" in values]
    assert histogram["gradinit/scales"] == learned_scales(tmp_path)
