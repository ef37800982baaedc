"""The plugin, loaded and not used, leaves the numbers of any task as they are.

`benchmarks/unused.py` has the long version, with a process for each training. Here one process does
them all, first without the plugin, which cannot be unloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, digest, train_here
from unused import TASKS, USUAL

SHORT = ["--cpu", "--max-update", "5", "--log-format", "simple", "--no-save"]


def outcomes(parallel: Path, monolingual: Path, plugin: bool) -> dict[str, object]:
    """Of each task: what the log says of the updates, the data they saw, and the weights."""
    found: dict[str, object] = {}
    for task, options in TASKS.items():
        data = parallel if "translation" in task else monolingual
        run = train_here(data, Path("unused"), *SHORT, *options, base=USUAL, plugin=plugin)
        assert run.code == 0, run.output
        found[task] = [run.updates, run.batches, digest(run.weights)]
    return found


def print_both(parallel: str, monolingual: str) -> None:
    """Run by the test in a process that has not loaded the plugin."""
    folders = Path(parallel), Path(monolingual)
    without = outcomes(*folders, plugin=False)
    assert "fairseq_gradinit.plugin" not in sys.modules
    print(json.dumps([without, outcomes(*folders, plugin=True)]))
    assert "fairseq_gradinit.plugin" in sys.modules


def test_the_plugin_changes_no_number_of_five_tasks(corpus, tmp_path):
    folders = [str(corpus.translation), str(corpus.language_model)]
    done = subprocess.run(
        [sys.executable, "-c", f"import test_unused; test_unused.print_both(*{folders!r})"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'benchmarks'}"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    without, loaded = json.loads(done.stdout.splitlines()[-1])
    assert without.keys() == TASKS.keys()
    for task, (updates, batches, weights) in without.items():
        assert len(set(updates)) == len(batches) == 5
        assert loaded[task] == [updates, batches, weights], task
