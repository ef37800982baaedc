"""Kill a recipe at random moments, from preparation to scores, and give the same command again.

    python benchmarks/soak_chain.py FOLDER [--count 50] [--seed 1] [--minutes 30]
    python benchmarks/soak_chain.py FOLDER --disk

The recipe is `multi30k/gradinit-adam.sh --smoke`: corpus, GradInit, training, averaging,
translation, scores. It runs once unbroken. Then it is started again and again in a folder of its
own, and its process group killed by SIGKILL at a moment drawn between its start and the time that
the unbroken run took; after five kills it is let go on to its end. Other runs are killed within
each copy of a checkpoint to checkpoint_last.pt, when nothing, half or all of it is written. What
a run came to must be what the unbroken one did: corpus, models and scales to the last bit,
translations and scores.

With --disk nothing is killed. One run is made on a disk that is too small, and given again with 50
KiB more after each failure until it ends; each failure must be told as one of room. It takes root.

FOLDER keeps the runs; the same command goes on with what is not done. The records are
benchmarks/results/soak-chain.json and soak-disk.json.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from record import REPOSITORY, RESULTS, write
from soak import BIN, environment, phase_of

from fairseq_gradinit.checkpoints import allow_fairseq_checkpoints
from fairseq_gradinit.files import write_atomically
from fairseq_gradinit.results import read_runs
from fairseq_gradinit.scales import FILE_NAME, Scales
from fairseq_gradinit.typed_json import parse

RECIPE = ["bash", str(REPOSITORY / "recipes/multi30k/gradinit-adam.sh"), "--smoke"]
KILLS_IN_A_RUN = 5
FIRST_KIB, MORE_KIB = 2000, 50  # of a disk; the preparation refuses a smaller one
COPIES = 3  # of a checkpoint to checkpoint_last.pt, in a smoke run
# Python reads it when it starts. The copy is that of fairseq, which is then not gone on with.
KILLED_IN_THE_COPY = """
import os, shutil, signal

usual = shutil.copyfile

def copyfile(source, target, **options):
    if os.path.basename(target) != "checkpoint_last.pt":
        return usual(source, target, **options)
    with open(source, "rb") as whole, open(target, "wb") as part:
        content = whole.read()
        part.write(content[: int(PART * len(content))])
    os.killpg(0, signal.SIGKILL)

shutil.copyfile = copyfile
"""
# What the recipe prints before a step: the words that tell it.
STEPS = {
    "/prepare.py ": "preparation",
    "== ": "before training",
    "fairseq-train ": "training",
    "/average_checkpoints.py ": "averaging",
    "fairseq-generate ": "translation",
    "/score.sh ": "scoring",
}


class RunFailed(Exception):
    """The recipe ended with an error; the message is what it printed last."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to; digests stand for what is large."""

    corpus: str
    scales: Scales
    last_model: str
    average_model: str
    translations: str
    results: str

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        """The outcome of the run in this folder, which has ended."""
        run = run_in(folder)
        (record,) = read_runs([folder / "smoke/results.jsonl"])
        rows = (run / "generate-test.txt").read_text().splitlines()
        data = folder / "smoke/data/numbers/data-bin"
        return cls(
            corpus=digest(
                path.read_bytes() for path in sorted(data.iterdir()) if path.suffix != ".json"
            ),
            scales=Scales.load(run / "checkpoints" / FILE_NAME),
            last_model=model_digest(run / "checkpoints/checkpoint_last.pt"),
            average_model=model_digest(run / "average.pt"),
            translations=digest(row.encode() for row in sorted(rows) if row[:2] != "20"),
            results=repr((record.settings, record.valid, record.valid_loss, record.scores)),
        )

    def differences(self, other: Outcome) -> list[str]:
        """Names of what is not the same."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]


@dataclass(frozen=True)
class Broken:
    """A run with kills, or failures for want of room.

    Attributes:
        kills: the step in which each of them fell.
        differs: what is not as in the unbroken run.
        left_over: files that the unbroken run does not have.
    """

    kills: tuple[str, ...]
    differs: tuple[str, ...]
    left_over: tuple[str, ...]


def digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()


def model_digest(checkpoint: Path) -> str:
    allow_fairseq_checkpoints()
    model = torch.load(checkpoint, weights_only=True)["model"]
    return digest(name.encode() + model[name].numpy().tobytes() for name in sorted(model))


def run_in(folder: Path) -> Path:
    """Where the recipe has its checkpoints and logs."""
    (run,) = folder.glob("smoke/multi30k/gradinit-adam/*/seed-1")
    return run


def start(folder: Path, python_path: Path | None = None) -> subprocess.Popen[bytes]:
    """The recipe in a process group of its own, with its output in a file."""
    folder.mkdir(exist_ok=True)
    path = {} if python_path is None else {"PYTHONPATH": str(python_path)}
    search = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            RECIPE,
            env={**environment(), **search, **path, "RUNS": str(folder)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for the end of the recipe.

    Raises:
        RunFailed: it ended with an error.
    """
    if process.wait() != 0:
        raise RunFailed((folder / "output").read_text(errors="replace")[-2000:])


def step_of(folder: Path) -> str:
    """In which step a kill fell, by what the recipe printed last."""
    found = "start"
    for line in (folder / "output").read_text(errors="replace").splitlines():
        found = next((step for words, step in STEPS.items() if words in f"{line} "), found)
    return phase_of(run_in(folder) / "checkpoints") if found == "training" else found


def killed_at_random(folder: Path, seed: str, longest: float, kills: int) -> list[str]:
    """Kill the run up to so many times, and let it end; returns the steps that kills fell in."""
    rng = random.Random(seed)
    met: list[str] = []
    while len(met) < kills:
        process = start(folder)
        try:
            process.wait(timeout=rng.uniform(0.0, longest))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            met.append(step_of(folder))
        else:
            finish(process, folder)
            return met
    finish(start(folder), folder)
    return met


def killed_in_copies(folder: Path, part: float) -> list[str]:
    """Kill the run in each copy to checkpoint_last.pt, when `part` of it is written."""
    aim = folder / "aim"
    aim.mkdir()
    (aim / "sitecustomize.py").write_text(KILLED_IN_THE_COPY.replace("PART", str(part)))
    for copy in range(COPIES):
        process = start(folder, aim)
        if process.wait() != -signal.SIGKILL:
            finish(process, folder)
            raise RunFailed(f"there was no copy number {copy + 1} to kill it in")
    shutil.rmtree(aim)
    finish(start(folder), folder)
    return [f"copy of a checkpoint, {part:.0%} written"] * COPIES


def on_a_growing_disk(folder: Path) -> list[str]:
    """Run on a disk that fills up, with more room each time; returns the steps it failed in."""
    disk = folder / "smoke"
    disk.mkdir()
    met: list[str] = []
    for kib in itertools.count(FIRST_KIB, MORE_KIB):
        options = f"{'remount,' if met else ''}size={kib}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
        process = start(folder)
        if process.wait() == 0:
            break
        met.append(step_of(folder))
        told = "\n".join((folder / "output").read_text().splitlines()[-2:])
        if not re.search("room|No space left", told):
            raise RunFailed(told)
    kept = shutil.copytree(disk, folder / "kept")
    subprocess.run(["umount", disk], check=True)
    disk.rmdir()
    kept.rename(disk)
    return met


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def broken(folder: Path, unbroken: Path, kill: Callable[[Path], list[str]]) -> Broken:
    """A run that `kill` kills; read from its folder if it has ended before."""
    ended = folder / "ended.json"
    if not ended.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kills = kill(folder)
        found = Broken(
            kills=tuple(kills),
            differs=tuple(Outcome.of(folder).differences(Outcome.of(unbroken))),
            left_over=tuple(sorted(files_of(folder) - files_of(unbroken))),
        )
        write_atomically(ended, json.dumps(asdict(found)))
    return parse(Broken, json.loads(ended.read_text()))


def unbroken_run(folder: Path) -> float:
    """Run the recipe once without a kill; returns the seconds that it took."""
    taken = folder / "seconds"
    if not taken.exists():
        shutil.rmtree(folder, ignore_errors=True)
        since = time.monotonic()
        finish(start(folder), folder)
        write_atomically(taken, f"{time.monotonic() - since:.1f}")
    return float(taken.read_text())


def soak(folder: Path, count: int, seed: int, minutes: float) -> list[Broken]:
    """All runs, written down after each of them."""
    begun = time.monotonic()
    unbroken = folder / "unbroken"
    longest = unbroken_run(unbroken)
    runs: list[Broken] = []

    def add(run: Broken) -> None:
        runs.append(run)
        met = Counter(step for run in runs for step in run.kills)
        results = {
            "kills": met.total(),
            "kills_by_step": dict(met.most_common()),
            "runs": len(runs),
            "runs_that_differ": {i: run.differs for i, run in enumerate(runs) if run.differs},
            "files_left_over": dict(Counter(name for run in runs for name in run.left_over)),
            "seconds_of_the_unbroken_run": longest,
        }
        write(RESULTS / "soak-chain.json", results)
        print(f"{met.total()} kills in {len(runs)} runs, {len(results['runs_that_differ'])} differ")

    for part in (0.0, 0.5, 1.0):
        kill = partial(killed_in_copies, part=part)
        add(broken(folder / f"copies-{part}", unbroken, kill))
    left = count
    while left > 0 and time.monotonic() - begun < 60 * minutes:
        name = f"run-{len(runs)}"
        kill = partial(
            killed_at_random,
            seed=f"{seed} {name}",
            longest=longest,
            kills=min(KILLS_IN_A_RUN, left),
        )
        add(broken(folder / name, unbroken, kill))
        left -= len(runs[-1].kills)
    return runs


def soak_disk(folder: Path) -> list[Broken]:
    """The run on a growing disk, written down."""
    unbroken = folder / "unbroken"
    unbroken_run(unbroken)
    run = broken(folder / "disk", unbroken, on_a_growing_disk)
    results = {"failures": len(run.kills), "failures_by_step": dict(Counter(run.kills))}
    write(RESULTS / "soak-disk.json", {**results, "differs": run.differs})
    print(results)
    return [run]


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=50, help="of kills at random moments")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=30.0, help="after which no run begins")
    parser.add_argument("--disk", action="store_true", help="fill up a disk instead")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    try:
        runs = (
            soak_disk(folder)
            if options.disk
            else soak(folder, options.count, options.seed, options.minutes)
        )
    except RunFailed as failure:
        sys.exit(f"soak_chain: the recipe failed: {failure}")
    if any(run.differs for run in runs):
        sys.exit("soak_chain: a run came to something else than the unbroken one")


if __name__ == "__main__":
    main()
