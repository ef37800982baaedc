"""Give the same command again: the same scales, losses and weights, to the last bit?

    python benchmarks/determinism.py [--repeats 3]

A Transformer large enough that torch shares its work among threads is given scales by GradInit and
trained, with each preset, with one thread and with two, several times each. All runs with the same
number of threads must agree. Whether one thread and two agree is recorded, and need not be so.

Leaves a record in benchmarks/results/determinism.json, and exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import RESULTS, write
from soak import make_corpus
from unused import LABEL_SMOOTHING, PLUGIN, Run, same, train

from fairseq_gradinit.scales import FILE_NAME

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


def repeat(data: Path, folder: Path, preset: str, threads: int, times: int) -> tuple[Run, bytes]:
    """Run the command several times; the run, which all the others agree with, and its scales.

    Raises:
        SystemExit: two runs differ.
    """
    outcomes = []
    for i in range(times):
        save_dir = folder / f"{preset}-{threads}-{i}"
        run = train(data, save_dir, [*COMMAND, *PRESETS[preset]], threads)
        outcomes.append((run, (save_dir / FILE_NAME).read_bytes()))
    first, scales = outcomes[0]
    if not all(same(first, run) and scales == others for run, others in outcomes):
        sys.exit(f"determinism: runs with preset {preset} and {threads} thread(s) differ")
    return first, scales


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="determinism-") as name:
        folder = Path(name)
        data = make_corpus(folder)
        for preset in PRESETS:
            runs = {n: repeat(data, folder, preset, n, options.repeats) for n in THREADS}
            (one, scales), (two, other_scales) = (runs[n] for n in THREADS)
            found[preset] = {
                "runs_the_same_with_each_number_of_threads": options.repeats,
                "updates": len(one.updates),
                "last_loss": {n: run.updates[-1]["loss"] for n, (run, _) in runs.items()},
                "one_thread_and_two_agree": same(one, two) and scales == other_scales,
            }
            print(preset, found[preset], flush=True)
    write(RESULTS / "determinism.json", found)


if __name__ == "__main__":
    main()
