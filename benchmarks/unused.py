"""Train with the plugin loaded but not used, and without it: the same numbers, in the same time?

    python benchmarks/unused.py [--updates 200] [--repeats 7]

For each of five tasks a tiny model is trained on sentences of random words, by fairseq-train as it
is and with `--user-dir fairseq_gradinit` alone. The two must agree to the last bit in what the log
says of every update, in the weights, and in all that the optimizer keeps. The two run in turn, the
first of a pair being the second of the next, and what they took is compared pair by pair.

Leaves a record in benchmarks/results/unused.json, and exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import torch
from record import RESULTS, write
from soak import BIN, environment, make_corpus

from fairseq_gradinit.checkpoints import allow_fairseq_checkpoints

PLUGIN = ("--user-dir", "fairseq_gradinit")

ENCODER = [
    *("--encoder-layers", "2", "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64"),
    *("--encoder-attention-heads", "2"),
]
DECODER = [
    *("--decoder-layers", "2", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64"),
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
    *("--num-workers", "0", "--disable-validation", "--save-interval", "10000"),
    # Without the thread that reads ahead, which at times aborts a process that is done.
    *("--data-buffer-size", "0"),
    *("--log-format", "json", "--log-interval", "1"),
]

# fairseq-train, whose log rounds its numbers no more.
PROGRAM = """
from fairseq_cli.train import cli_main
from fairseq.logging import meters, progress_bar
meters.safe_round = lambda number, digits: number
format_stat = progress_bar.format_stat
progress_bar.format_stat = lambda stat: (
    format_stat(stat) if isinstance(stat, str) else repr(float(getattr(stat, "avg", stat)))
)
cli_main()
"""
# What the log says of an update that is of times and not of numbers.
TIMES = {"wps", "ups", "train_wall", "wall"}


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        updates: what the log says of each.
        tensors: all in the checkpoint, by where they stand in it.
        per_update: seconds, the median of all updates but the first.
        seconds: of the whole process.
        cpu_seconds: of the whole process, which depend less on what else the machine does.
    """

    updates: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    per_update: float
    seconds: float
    cpu_seconds: float


def train(
    data: Path, save_dir: Path, options: Sequence[str], threads: int = 1, device: str = "cpu"
) -> Run:
    """Run fairseq-train in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(data), *USUAL, *options]
    if device == "cpu":
        command.append("--cpu")
    log = save_dir.with_suffix(".log")
    begun = monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--save-dir", str(save_dir)],
            stdout=file,
            stderr=file,
            env={**environment(), "OMP_NUM_THREADS": str(threads)},
            cwd="/",
        )
        _, status, used = os.wait4(process.pid, 0)
    seconds = monotonic() - begun
    if status != 0:
        sys.exit(f"unused: training failed: {log.read_text()[-2000:]}")
    lines = [line for line in log.read_text().splitlines() if "| train_inner | " in line]
    updates = [json.loads(line.rpartition(" | ")[2]) for line in lines]
    allow_fairseq_checkpoints()
    state = torch.load(save_dir / "checkpoint_last.pt", weights_only=True)
    kept = {name: state[name] for name in ("model", "last_optimizer_state")}
    return Run(
        [{k: v for k, v in update.items() if k not in TIMES} for update in updates],
        dict(tensors_in(kept)),
        median(1 / float(update["ups"]) for update in updates[1:]),
        seconds,
        used.ru_utime + used.ru_stime,
    )


def tensors_in(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in a nested state, with their paths."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict):
        yield from chain(*(tensors_in(value, f"{name}/{key}") for key, value in state.items()))
    elif isinstance(state, list):
        yield from chain(*(tensors_in(value, f"{name}/{i}") for i, value in enumerate(state)))


def same(one: Run, other: Run) -> bool:
    """Whether two runs agree to the last bit."""
    tensors, others = one.tensors, other.tensors
    return (
        one.updates == other.updates
        and tensors.keys() == others.keys()
        and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    )


def ratios(pairs: Sequence[tuple[Run, Run]], attribute: str) -> dict[str, float]:
    """What the plugin's runs took, in units of what those without it took in the same pair."""
    found = sorted(
        getattr(plugin, attribute) / getattr(stock, attribute) for stock, plugin in pairs
    )
    return {
        "median": round(median(found), 4),
        "least": round(found[0], 4),
        "most": round(found[-1], 4),
    }


def measure(data: Path, folder: Path, options: Sequence[str], repeats: int) -> dict[str, Any]:
    """Pairs of trainings without the plugin and with it, and how the two differ."""
    pairs = []
    for i in range(repeats):
        sides: dict[str, Run] = {}
        names = ["stock", "plugin"] if i % 2 == 0 else ["plugin", "stock"]
        for name in names:
            loaded = PLUGIN if name == "plugin" else ()
            sides[name] = train(data, folder / f"{name}{i}", [*options, *loaded])
        pairs.append((sides["stock"], sides["plugin"]))
    first = pairs[0][0]
    return {
        "updates": len(first.updates),
        "first_and_last_loss": [first.updates[0]["loss"], first.updates[-1]["loss"]],
        "tensors_compared": len(first.tensors),
        "pairs": repeats,
        "all_runs_the_same": all(same(first, run) for run in chain(*pairs)),
        "ratio_of_seconds_per_update": ratios(pairs, "per_update"),
        "ratio_of_seconds_of_the_process": ratios(pairs, "seconds"),
        "ratio_of_cpu_seconds_of_the_process": ratios(pairs, "cpu_seconds"),
        "seconds_per_update_without": round(median(s.per_update for s, _ in pairs), 5),
        "seconds_of_the_process_without": round(median(s.seconds for s, _ in pairs), 2),
    }


def make_monolingual(folder: Path) -> Path:
    """The source side of the corpus in `folder`, for tasks of one language."""
    command = [BIN / "fairseq-preprocess", "--only-source", "--trainpref", folder / "train.de"]
    command += ["--destdir", folder / "monolingual"]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    return folder / "monolingual"


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(prefix="unused-") as name:
        folder = Path(name)
        parallel, monolingual = make_corpus(folder), make_monolingual(folder)
        for task, settings in TASKS.items():
            data = parallel if "translation" in task else monolingual
            settings = [*settings, "--max-update", str(options.updates)]
            (folder / task).mkdir()
            found[task] = measure(data, folder / task, settings, options.repeats)
            print(task, found[task], flush=True)
            write(RESULTS / "unused.json", found)
    if not all(result["all_runs_the_same"] for result in found.values()):
        sys.exit("unused: a run with the plugin loaded came to other numbers than one without it")


if __name__ == "__main__":
    main()
