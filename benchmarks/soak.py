"""Kill a training with GradInit at random moments, and watch its memory and files over many steps.

    python benchmarks/soak.py kills [--count 50] [--seed 1] [--minutes 10]
    python benchmarks/soak.py memory [--updates 20000] [--iterations 1000]
    python benchmarks/soak.py dictionary [--entries 500000]

`kills` trains a tiny model on sentences of random words, once unbroken. Then the same command is
started again and again, and killed by SIGKILL at a moment drawn between its start and the time
that the unbroken run took; each time it is let go on, five times in a run, and then to its end.
Model and scales must be those of the unbroken run, to the last bit.

`memory` samples resident memory and open files of a training with a checkpoint every 50 updates,
of the same without the plugin, and of one whose GradInit takes many iterations. What starts up is
over after the first quarter; the slope is that of the other three.

`dictionary` measures the peak of memory at a dictionary of 4 entries and at one of many, where
embeddings and logits are nearly all that there is.

All leave a record in benchmarks/results/soak-*.json, and need Linux.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from record import REPOSITORY, RESULTS, write

sys.path.insert(0, str(REPOSITORY / "recipes"))

from resume import trained_updates

from fairseq_gradinit.checkpoints import allow_fairseq_checkpoints
from fairseq_gradinit.scales import FILE_NAME, Scales

UPDATES = 12
KILLS_IN_A_RUN = 5
SAMPLES_KEPT = 200
# In the log: updates at the end of an epoch, or iterations of GradInit.
STEP = re.compile(r"\| num_updates (\d+) \||\| gradinit: +(\d+) / ")
BIN = Path(sys.executable).parent
PLAIN_TRAINING = [
    *("--arch", "transformer", "--encoder-layers", "2", "--decoder-layers", "2"),
    *("--encoder-attention-heads", "4", "--decoder-attention-heads", "4"),
    "--share-all-embeddings",
    *("--encoder-embed-dim", "32", "--decoder-embed-dim", "32"),
    *("--encoder-ffn-embed-dim", "64", "--decoder-ffn-embed-dim", "64"),
    *("--optimizer", "adam", "--lr", "1e-3", "--dropout", "0.1", "--max-tokens", "200"),
    *("--cpu", "--num-workers", "0", "--disable-validation", "--no-progress-bar"),
    "--no-epoch-checkpoints",
]
TRAINING = [
    *("--user-dir", "fairseq_gradinit", "--gradinit", "--gradinit-save-interval", "1"),
    *PLAIN_TRAINING,
]


@dataclass(frozen=True)
class Sample:
    """Of a process: seconds since its start, steps in its log, resident KiB, open files."""

    seconds: float
    step: int
    memory: int
    files: int


def make_corpus(folder: Path, words: int = 40, entries: int = 0) -> Path:
    """Binarised sentences of random words; the target is the source reversed.

    Args:
        words: how many there are.
        entries: of the dictionary, if it has others too.
    """
    folder.mkdir(exist_ok=True)
    rng = random.Random(1)
    rows = [[f"w{rng.randrange(words)}" for _ in range(rng.randint(3, 9))] for _ in range(400)]
    (folder / "train.de").write_text("".join(f"{' '.join(row)}\n" for row in rows))
    (folder / "train.en").write_text("".join(f"{' '.join(row[::-1])}\n" for row in rows))
    command = ["fairseq-preprocess", "-s", "de", "-t", "en", "--joined-dictionary"]
    command += ["--trainpref", str(folder / "train"), "--destdir", str(folder / "data")]
    if entries:
        (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(entries)))
        command += ["--srcdict", str(folder / "dict.txt")]
    subprocess.run(
        [BIN / command[0], *command[1:]], check=True, capture_output=True, env=environment()
    )
    return folder / "data"


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def start(
    data: Path, save_dir: Path, *options: object, base: Sequence[str] = TRAINING
) -> subprocess.Popen[bytes]:
    """fairseq-train, with its log beside the checkpoints."""
    save_dir.mkdir(exist_ok=True)
    command = [BIN / "fairseq-train", data, *base, "--save-dir", save_dir, *options]
    with (save_dir / "log").open("ab") as log:
        return subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=environment(), cwd="/"
        )


def finish(process: subprocess.Popen[bytes], save_dir: Path) -> None:
    if process.wait() != 0:
        sys.exit(f"soak: training failed: {(save_dir / 'log').read_text()[-2000:]}")


def outcome(save_dir: Path) -> tuple[dict[str, torch.Tensor], Scales]:
    """The trained model and the scales that a run has left."""
    allow_fairseq_checkpoints()
    state = torch.load(save_dir / "checkpoint_last.pt", weights_only=True)
    return state["model"], Scales.load(save_dir / FILE_NAME)


def same(one: Path, other: Path) -> bool:
    """Whether two runs came to the same model and scales, to the last bit."""
    (weights, scales), (others, other_scales) = outcome(one), outcome(other)
    equal = weights.keys() == others.keys() and all(
        torch.equal(w, others[n]) for n, w in weights.items()
    )
    return equal and scales == other_scales


def phase_of(save_dir: Path) -> str:
    """What a kill found done, by the files that are there."""
    if (save_dir / "checkpoint_last.pt").exists():
        return "training, from a checkpoint"
    if (save_dir / FILE_NAME).exists():
        return "training, before a checkpoint"
    return "learning" if (save_dir / "gradinit_state.json").exists() else "before learning"


def kills(count: int, seed: int, minutes: float) -> None:
    """Kill `count` times, or as often as fits in so many minutes; exit with 1 on a difference."""
    rng = random.Random(seed)
    options = ["--max-update", UPDATES, "--save-interval-updates", 3, "--gradinit-iterations", 12]
    begun = time.monotonic()
    met: dict[str, int] = {}
    different: list[int] = []
    runs = 0
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        data = make_corpus(folder)
        since = time.monotonic()
        finish(start(data, folder / "unbroken", *options), folder / "unbroken")
        unbroken = time.monotonic() - since
        while sum(met.values()) < count and time.monotonic() - begun < 60 * minutes:
            runs += 1
            save_dir = folder / f"run{runs}"
            left = min(KILLS_IN_A_RUN, count - sum(met.values()))
            # At --max-update already, fairseq would do one update more.
            while not save_dir.exists() or trained_updates(save_dir) < UPDATES:
                process = start(data, save_dir, *options)
                if left == 0:
                    finish(process, save_dir)
                    break
                try:
                    process.wait(timeout=rng.uniform(0.0, unbroken))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    left -= 1
                    phase = phase_of(save_dir)
                    met[phase] = met.get(phase, 0) + 1
            if not same(save_dir, folder / "unbroken"):
                different.append(runs)
            print(f"{sum(met.values())} kills in {runs} runs, {len(different)} differ", flush=True)
    results = {
        "kills": sum(met.values()),
        "kills_by_what_was_on_disk": met,
        "runs": runs,
        "runs_that_differ": different,
        "seconds_of_the_unbroken_run": round(unbroken, 2),
    }
    write(RESULTS / "soak-kills.json", results)
    if different:
        sys.exit("soak: a run that was killed came to another model or other scales")


def sampled(process: subprocess.Popen[bytes], log: Path, interval: float = 0.2) -> list[Sample]:
    """Samples of a process until it ends."""
    begun = time.monotonic()
    samples: list[Sample] = []
    proc = Path(f"/proc/{process.pid}")
    with log.open() as lines:
        step = 0
        while process.poll() is None:
            for told in STEP.findall(lines.read()):
                step = max(step, int("".join(told)))
            try:
                pages = int((proc / "statm").read_text().split()[1])
                files = len(list((proc / "fd").iterdir()))
            except (OSError, IndexError):
                break
            resident = pages * os.sysconf("SC_PAGE_SIZE") // 1024
            samples.append(Sample(round(time.monotonic() - begun, 2), step, resident, files))
            time.sleep(interval)
    return samples


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """How memory and files grew once what starts up was done, a quarter into the run.

    The slope is the mean of the growths from each tenth of the rest to the next, and its error
    the standard error of that mean: neighbouring samples are too much alike to count one by one.
    """
    last = samples[-1].step
    rest = [sample for sample in samples if last / 4 < sample.step < last]
    # The log tells of steps now and then, of which there are as many in any second.
    per_second = np.polyfit([s.seconds for s in rest], [s.step for s in rest], 1)[0]
    tenths = np.array_split(np.array([astuple(s) for s in rest]), 10)
    seconds, _, memory, _ = np.array([tenth.mean(axis=0) for tenth in tenths]).T
    slopes = 1000 / per_second * np.diff(memory) / np.diff(seconds)
    return {
        "kib_per_1000_steps": round(float(slopes.mean()), 2),
        "standard_error": round(float(slopes.std(ddof=1) / math.sqrt(len(slopes))), 2),
        "memory_kib_first_tenth": round(float(memory[0])),
        "memory_kib_last_tenth": round(float(memory[-1])),
        "files_first_half": max(s.files for s in rest[: len(rest) // 2]),
        "files_second_half": max(s.files for s in rest[len(rest) // 2 :]),
        "samples": len(rest),
    }


def memory(updates: int, iterations: int) -> None:
    """Sample a long training with checkpoints, the same without the plugin, and a long GradInit."""
    training = ["--max-update", updates, "--save-interval-updates", 50]
    training += ["--keep-interval-updates", 2]
    learning = ["--max-update", 1, "--gradinit-iterations", iterations, "--no-save"]
    # fairseq's thread that reads ahead may be at work when the program ends, which aborts it.
    learning += ["--data-buffer-size", 0]
    cases = {
        f"{iterations} iterations": (TRAINING, learning),
        f"{updates} updates without the plugin": (PLAIN_TRAINING, training),
        f"{updates} updates": (TRAINING, [*training, "--gradinit-iterations", 2]),
    }
    found = {}
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        data = make_corpus(folder)
        for title, (base, options) in cases.items():
            save_dir = folder / title.replace(" ", "-")
            process = start(data, save_dir, *options, base=base)
            samples = sampled(process, save_dir / "log")
            finish(process, save_dir)
            thinned = samples[:: math.ceil(len(samples) / SAMPLES_KEPT)]
            found[title] = {**growth(samples), "some_samples": [astuple(s) for s in thinned]}
            print(title, growth(samples), flush=True)
    write(RESULTS / "soak-memory.json", found)


def dictionary(entries: int) -> None:
    """The peak of memory at dictionaries of 4 and of many entries, with and without GradInit."""
    short = ["--max-update", 2, "--no-save", "--data-buffer-size", 0, "--max-tokens", 24]
    cases = {
        "without the plugin": (PLAIN_TRAINING, short),
        "with GradInit": (TRAINING, [*short, "--gradinit-iterations", 3]),
    }
    found = {}
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        for size in (4, entries):
            data = make_corpus(folder / f"{size}", words=4, entries=size)
            for title, (base, options) in cases.items():
                save_dir = folder / f"{size}-{title.replace(' ', '-')}"
                process = start(data, save_dir, *options, base=base)
                _, status, used = os.wait4(process.pid, 0)
                if status != 0:
                    sys.exit(f"soak: training failed: {(save_dir / 'log').read_text()[-2000:]}")
                found[f"{size} entries, {title}"] = {"peak_memory_mib": used.ru_maxrss // 1024}
                print(size, "entries,", title, used.ru_maxrss // 1024, "MiB", flush=True)
    write(RESULTS / "soak-dictionary.json", found)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    programs = parser.add_subparsers(dest="program", required=True)
    killing = programs.add_parser("kills")
    killing.add_argument("--count", type=int, default=50)
    killing.add_argument("--seed", type=int, default=1)
    killing.add_argument("--minutes", type=float, default=10.0)
    watching = programs.add_parser("memory")
    watching.add_argument("--updates", type=int, default=20_000)
    watching.add_argument("--iterations", type=int, default=1000)
    large = programs.add_parser("dictionary")
    large.add_argument("--entries", type=int, default=500_000)
    options = parser.parse_args()
    if options.program == "kills":
        kills(options.count, options.seed, options.minutes)
    elif options.program == "memory":
        memory(options.updates, options.iterations)
    else:
        dictionary(options.entries)


if __name__ == "__main__":
    main()
