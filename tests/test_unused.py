"""The plugin, loaded and not used, leaves the numbers of any task as they are.

One process does all trainings, first without the plugin, which cannot be unloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, digest, train_here

ENCODER = [
    *("--encoder-layers", "1", "--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "32"),
    *("--encoder-attention-heads", "2"),
]
DECODER = [
    *("--decoder-layers", "1", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32"),
    *("--decoder-attention-heads", "2"),
]
LABEL_SMOOTHING = ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"]
TRANSLATION = ["--arch", "transformer_iwslt_de_en", *ENCODER, *DECODER, *LABEL_SMOOTHING]
PAIRS = ["--lang-pairs", "de-en,en-de"]
TASKS = {
    "translation": ["--task", "translation", *TRANSLATION],
    "translation_multi_simple_epoch": [
        *("--task", "translation_multi_simple_epoch", "--langs", "de,en", *PAIRS, *TRANSLATION),
        *("--encoder-langtok", "tgt", "--enable-reservsed-directions-shared-datasets"),
    ],
    "multilingual_translation": [
        *("--task", "multilingual_translation", *PAIRS),
        *("--arch", "multilingual_transformer_iwslt_de_en", *ENCODER, *DECODER, *LABEL_SMOOTHING),
    ],
    "language_modeling": [
        *("--task", "language_modeling", "--tokens-per-sample", "16"),
        *("--arch", "transformer_lm", *DECODER, "--criterion", "cross_entropy"),
    ],
    "masked_lm": [
        *("--task", "masked_lm", "--tokens-per-sample", "16"),
        *("--arch", "roberta_base", *ENCODER, "--criterion", "masked_lm"),
    ],
}
USUAL = [
    *("--optimizer", "adam", "--lr", "1e-3", "--lr-scheduler", "inverse_sqrt"),
    *("--warmup-updates", "50", "--clip-norm", "1", "--dropout", "0.1", "--max-tokens", "400"),
    *("--num-workers", "0", "--disable-validation", "--no-save", "--cpu", "--max-update", "5"),
    # Without the thread that reads ahead, which at times aborts a process that is done.
    *("--data-buffer-size", "0"),
    *("--log-format", "simple", "--log-interval", "1"),
]


def test_the_hooks_change_no_number(corpus, tmp_path, monkeypatch):
    from fairseq import options, tasks
    from fairseq.distributed import utils
    from fairseq.trainer import Trainer
    from test_train import same

    hooked = train_here(corpus.translation, tmp_path, "--no-save")
    assert hooked.code == 0, hooked.output
    for holder, name in (
        (options, "add_optimization_args"),
        (tasks, "setup_task"),
        (utils, "call_main"),
        (Trainer, "begin_epoch"),
    ):
        monkeypatch.setattr(holder, name, getattr(holder, name).__wrapped__)
    stock = train_here(corpus.translation, tmp_path, "--no-save")
    assert len(set(stock.updates)) == len(stock.batches) == 4
    assert (hooked.updates, hooked.batches) == (stock.updates, stock.batches)
    assert same(hooked.weights, stock.weights)


def outcomes(parallel: Path, monolingual: Path, plugin: bool) -> dict[str, object]:
    """Of each task: what the log says of the updates, the data they saw, and the weights."""
    found: dict[str, object] = {}
    for task, options in TASKS.items():
        data = parallel if "translation" in task else monolingual
        run = train_here(data, Path("unused"), *options, base=USUAL, plugin=plugin)
        assert run.code == 0, run.output
        found[task] = [run.updates, run.batches, digest(run.weights)]
    return found


def print_both(parallel: str, monolingual: str) -> None:
    """Train without the plugin, then with it; for a process that has not loaded it."""
    folders = Path(parallel), Path(monolingual)
    without = outcomes(*folders, plugin=False)
    assert "fairseq_gradinit.plugin.install" not in sys.modules
    print(json.dumps([without, outcomes(*folders, plugin=True)]))
    assert "fairseq_gradinit.plugin.install" in sys.modules


@pytest.mark.slow
def test_the_plugin_changes_no_number_of_five_tasks(corpus, tmp_path):
    folders = [str(corpus.translation), str(corpus.language_model)]
    done = subprocess.run(
        [sys.executable, "-c", f"import test_unused; test_unused.print_both(*{folders!r})"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    without, loaded = json.loads(done.stdout.splitlines()[-1])
    assert without.keys() == TASKS.keys()
    for task, (updates, batches, weights) in without.items():
        assert len(set(updates)) == len(batches) == 5
        assert loaded[task] == [updates, batches, weights], task
