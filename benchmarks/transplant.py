"""What does a short warmup change in the weights that a start could have instead?

    python benchmarks/transplant.py --results transplant.jsonl -- fairseq-train DATA ... --lr 4e-3
    python benchmarks/transplant.py --results transplant.jsonl --table

The training command has a learning rate at which GradInit without warmup fails. GradInit's start is
trained with a short warmup first, and its weights after 100 updates are kept. Then parts of them
are put into GradInit's start, and each of these starts is trained at the full rate from its first
update, with a new optimizer, on the same batches. Parts that make it train hold what warmup did.
Each run is one line of the results, of which the table is printed at the end.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_gradinit.check.probes import Prober
from fairseq_gradinit.check.records import Arm
from fairseq_gradinit.storage import append_line, read_lines

WARMUP, KEPT_AT, UPDATES = 140, 100, 250
LOOKS = (0, 5, 20, 40, 60, 100, 140, 200, 250)

Start = Callable[[str, Tensor, Tensor], Tensor]
"""Of a tensor's name, its initial and its warmed value: what to begin with."""


def only(part: Callable[[str], bool]) -> Start:
    return lambda name, initial, warmed: warmed if part(name) else initial


def embeddings(change: Callable[[Tensor, Tensor], Tensor]) -> Start:
    """`change` is given the initial embeddings and what warmup has added to them."""
    return lambda name, initial, warmed: (
        change(initial, warmed - initial) if is_embedding(name) else initial
    )


def is_embedding(name: str) -> bool:
    return "embed_tokens" in name


def low_rank(change: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def lengths(matrix: Tensor) -> Tensor:
    return matrix.norm(dim=1, keepdim=True)


def frequent_rows(change: Tensor, rows: int = 104) -> Tensor:
    """The change of the four special symbols and the 100 most frequent tokens."""
    return torch.where(torch.arange(len(change))[:, None] < rows, change, torch.zeros(()))


def random_rows(change: Tensor) -> Tensor:
    noise = torch.randn(change.shape, generator=torch.Generator().manual_seed(0))
    return noise / lengths(noise) * lengths(change)


STARTS: dict[str, Start] = {
    "no warmup": only(lambda name: False),
    "all weights": only(lambda name: True),
    "biases": only(lambda name: name.endswith("bias")),
    "LayerNorms": only(lambda name: "layer_norm" in name),
    "embeddings": only(is_embedding),
    "attention": only(lambda name: "attn" in name and "layer_norm" not in name),
    "feed-forward": only(lambda name: ".fc" in name),
    "decoder layers": only(lambda name: name.startswith("decoder")),
    "encoder and embeddings": only(lambda name: name.startswith("encoder")),
    "embeddings: their norm": embeddings(lambda e, d: e * ((e + d).norm() / e.norm())),
    "embeddings: row norms": embeddings(
        lambda e, d: e / lengths(e).clamp_min(1e-9) * lengths(e + d)
    ),
    "embeddings: rank 1 of the change": embeddings(lambda e, d: e + low_rank(d, 1)),
    "embeddings: all but rank 1": embeddings(lambda e, d: e + d - low_rank(d, 1)),
    "embeddings: rank 8": embeddings(lambda e, d: e + low_rank(d, 8)),
    "embeddings: all but rank 8": embeddings(lambda e, d: e + d - low_rank(d, 8)),
    "embeddings: 100 most frequent rows": embeddings(lambda e, d: e + frequent_rows(d)),
    "embeddings: all other rows": embeddings(lambda e, d: e + d - frequent_rows(d)),
    "embeddings: random change, same row norms": embeddings(lambda e, d: e + random_rows(d)),
}


def run(
    prober: Prober, warmup: int, visit: Callable[[int, Mapping[str, Tensor]], None]
) -> list[dict[str, Any]]:
    """What was seen of a training."""
    arm = Arm("gradinit", warmup=warmup > 0)
    probe = prober.run(arm, prober.lr, UPDATES, LOOKS, warmup, torch.no_grad()(visit))
    shares = probe.last_layer_shares()
    return [
        {
            "update": look.update,
            "loss": round(look.loss, 3),
            "source_bits": round(look.source_bits, 3),
            "shares": {side: float(f"{curve[i]:.2g}") for side, curve in shares.items()},
        }
        for i, look in enumerate(probe.looks)
    ]


def run_all(prober: Prober) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The names of the starts, and what was seen of them."""
    warmed: dict[str, Tensor] = {}

    def keep(update: int, tensors: Mapping[str, Tensor]) -> None:
        if update == KEPT_AT:
            warmed.update({name: tensor.clone() for name, tensor in tensors.items()})

    yield f"warmup over {WARMUP} updates", run(prober, WARMUP, keep)
    for what, start in STARTS.items():

        def begin(update: int, tensors: Mapping[str, Tensor], start: Start = start) -> None:
            for name, tensor in tensors.items() if update == 0 else ():
                tensor.copy_(start(name, tensor.clone(), warmed[name]))

        yield what, run(prober, 0, begin)


def looks_in(path: Path) -> dict[str, list[dict[str, Any]]]:
    return {row["start"]: row["looks"] for row in read_lines(path, dict, "a run of transplant.py")}


def table(path: Path) -> str:
    lines = [
        "| start | loss at 0 | 20 | 100 | last | source bits | token share |",
        "|" + "---|" * 7,
    ]
    for start, looks in looks_in(path).items():
        losses = {look["update"]: f"{look['loss']:.2f}" for look in looks}
        last = looks[-1]
        share = ", ".join(f"{side} {value:.2g}" for side, value in last["shares"].items())
        cells = [losses.get(0, ""), losses.get(20, ""), losses.get(100, ""), losses[last["update"]]]
        cells += [f"{last['source_bits']:.2f}", share]
        lines.append("| " + " | ".join([start, *cells]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--results", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--table", action="store_true", help="show the results, and run nothing")
    parser.add_argument("training", nargs="*", help="the command, after --")
    options = parser.parse_args(arguments)
    if not options.table:
        warnings.simplefilter("ignore")
        logging.disable(logging.INFO)
        with tempfile.TemporaryDirectory() as folder:
            for start, looks in run_all(Prober(options.training, Path(folder))):
                append_line(options.results, {"start": start, "looks": looks})
    print(table(options.results))


if __name__ == "__main__":
    main()
