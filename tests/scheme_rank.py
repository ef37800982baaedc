"""One process of several that initialise a model together: `torchrun scheme_rank.py FOLDER`.

Writes the omegas, gradient quotients, their slopes at the start and the weights that it came to, as
FOLDER/RANK.json. Without torchrun it has all the data.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from scheme_models import build
from test_scheme_metainit import loss_of, smooth_net

from fairseq_gradinit.processes import OneProcess, Processes, ProcessGroup
from fairseq_gradinit.schemes.admin import fill, set_omegas
from fairseq_gradinit.schemes.metainit import MetaInitConfig, move_norms, quotient_and_slopes


def omegas(processes: Processes) -> dict[str, list[float]]:
    model = build("transformer_admin")

    def evaluate(row: int) -> None:
        tokens = 4 + (row * 7 + torch.arange(7)[None]) % 90
        model(tokens, torch.full((1,), 7), tokens)

    return set_omegas(model, fill, evaluate, list(range(6)), processes)


def moved(processes: Processes) -> tuple[list[float], list[list[float]]]:
    net, rows = smooth_net()
    own = torch.cat(rows) if processes.count == 1 else rows[processes.rank]
    config = MetaInitConfig(iterations=4, lr=0.05)
    parameters = list(net.parameters())
    slopes = quotient_and_slopes(parameters, loss_of(net), own, config.eps, processes)[1]
    quotients = move_norms(parameters, loss_of(net), [own] * 4, config, processes)
    return quotients, [slopes.tolist(), *(p.flatten().tolist() for p in parameters)]


def main() -> None:
    torch.set_num_threads(1)
    processes: Processes = OneProcess()
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        processes = ProcessGroup()
    found = [omegas(processes), *moved(processes)]
    (Path(sys.argv[1]) / f"{processes.rank}.json").write_text(json.dumps(found))
    if processes.count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
