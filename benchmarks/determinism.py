"""Give the same command again: the same scales, losses and weights, to the last bit?

    python benchmarks/determinism.py [--repeats 3]
    python benchmarks/determinism.py --device cuda

A Transformer large enough that torch shares its work among threads is given scales by GradInit and
trained, with each preset, with one thread and with two, several times each. All runs with the same
number of threads must agree. Whether one thread and two agree is recorded, and need not be so.
A GPU does not promise the same sums: there, how far runs are apart is recorded, for trainings in
fp32 and in fp16.

Leaves a record in benchmarks/results/determinism.json, and exits with 1 on a difference; of a GPU
in determinism-cuda.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from record import RESULTS, write
from soak import make_corpus
from unused import LABEL_SMOOTHING, PLUGIN, Run, same, train

from fairseq_gradinit.scales import FILE_NAME, Scales

THREADS = (1, 2)
COMMAND = [
    *("--task", "translation", "--arch", "transformer_iwslt_de_en", *LABEL_SMOOTHING),
    *("--encoder-layers", "2", "--encoder-embed-dim", "128", "--encoder-ffn-embed-dim", "512"),
    *("--decoder-layers", "2", "--decoder-embed-dim", "128", "--decoder-ffn-embed-dim", "512"),
    *(*PLUGIN, "--gradinit", "--gradinit-iterations", "10", "--max-tokens", "1000"),
    *("--max-update", "10"),
]
PRESETS = {
    "default": [],
    # With a bound on the norm of the gradient, and so products with the Hessian.
    "paper": ["--gradinit-preset", "paper", "--gradinit-max-tokens", "1500"],
}
# Of training; GradInit is in fp32 with both.
PRECISIONS = {"fp32": [], "fp16": ["--fp16"]}


def trainings(
    data: Path, folder: Path, preset: str, times: int, *options: str, **how: Any
) -> Iterator[tuple[Run, Path]]:
    """Train several times, `how` being for `train`; the runs, and the files of their scales."""
    for _ in range(times):
        save_dir = Path(tempfile.mkdtemp(dir=folder))
        run = train(data, save_dir, [*COMMAND, *PRESETS[preset], *options], **how)
        yield run, save_dir / FILE_NAME


def repeat(data: Path, folder: Path, preset: str, threads: int, times: int) -> tuple[Run, bytes]:
    """Run the command several times; the run, which all the others agree with, and its scales.

    Raises:
        SystemExit: two runs differ.
    """
    runs = trainings(data, folder, preset, times, threads=threads)
    (first, scales), *others = ((run, path.read_bytes()) for run, path in runs)
    if not all(same(first, run) and scales == theirs for run, theirs in others):
        sys.exit(f"determinism: runs with preset {preset} and {threads} thread(s) differ")
    return first, scales


def on_cpu(data: Path, folder: Path, preset: str, repeats: int) -> dict[str, Any]:
    """Runs with one thread and with two."""
    runs = {n: repeat(data, folder, preset, n, repeats) for n in THREADS}
    (one, scales), (two, other_scales) = (runs[n] for n in THREADS)
    return {
        "runs_the_same_with_each_number_of_threads": repeats,
        "updates": len(one.updates),
        "last_loss": {n: run.updates[-1]["loss"] for n, (run, _) in runs.items()},
        "one_thread_and_two_agree": same(one, two) and scales == other_scales,
    }


def on_gpu(data: Path, folder: Path, preset: str, precision: str, repeats: int) -> dict[str, Any]:
    """How far runs are apart, the largest difference of any two of them."""
    losses, scales = [], []
    options = PRECISIONS[precision]
    for run, path in trainings(data, folder, preset, repeats, *options, device="cuda"):
        losses.append([float(update["loss"]) for update in run.updates])
        scales.append([block.scale for block in Scales.load(path).blocks])
    return {
        "runs": repeats,
        "scales": len(scales[0]),
        "largest_difference_of_a_scale": largest_difference(scales),
        "first_losses": [each[0] for each in losses],
        "last_losses": [each[-1] for each in losses],
        "largest_difference_of_a_loss": largest_difference(losses),
    }


def largest_difference(rows: list[list[float]]) -> float:
    """Of numbers that stand in the same place of two rows."""
    pairs = combinations(rows, 2)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="determinism-") as name:
        folder = Path(name)
        data = make_corpus(folder)
        for preset in PRESETS:
            if options.device == "cpu":
                found[preset] = on_cpu(data, folder, preset, options.repeats)
            else:
                found[preset] = {
                    precision: on_gpu(data, folder, preset, precision, options.repeats)
                    for precision in PRECISIONS
                }
            print(preset, json.dumps(found[preset]), flush=True)
    kept = "determinism.json" if options.device == "cpu" else "determinism-cuda.json"
    write(options.results / kept, found)


if __name__ == "__main__":
    main()
