"""Admin: shortcuts weighted so that each sublayer depends on its own branch as in pre-LN.

Liu et al., "Understanding the Difficulty of Training Transformers", EMNLP 2020, section 4:
LayerNorm(omega x + f(x)), with one vector omega for each sublayer, trained like any parameter. It
starts as omega_i^2 = sum over j < i of Var[f_j], the variances being measured with the initial
weights on training data. As in the authors' code (LiyuanLucasLiu/Transformer-Clinic,
modules/transformer_layer.py), omega_1 is 1, and the sum begins with the variance of the embeddings.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from fairseq_gradinit.engine import Processes, deterministic
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.batches import PairedBatches
from fairseq_gradinit.plugin.branches import stacks, variances, weigh_shortcuts
from fairseq_gradinit.plugin.loss import TaskLoss
from fairseq_gradinit.plugin.trainer import data_parallel_processes, trained_modules

logger = logging.getLogger("fairseq_gradinit")

SENTENCES = 32
"""Some hundred tokens, each with every dimension of an output."""


def add_omegas(model: nn.Module) -> None:
    """Give every sublayer of a post-LN model its omega, a trainable vector of ones."""
    for stack in stacks(model):
        for layer in stack.layers:
            weigh_shortcuts(layer, nn.Parameter(torch.ones(cast(Any, layer).embed_dim)))


def measure_omegas(trainer: Any) -> None:
    """Measure the branches of the trainer's model, and set its omegas."""
    data = trainer.cfg.dataset
    try:
        batches = PairedBatches(trainer, data.max_tokens, data.batch_size, micro_batches=1)
    except GradInitError as error:
        raise GradInitError(
            "--init-scheme admin draws sentences by index from training data of several batches "
            "with three sentences or more, and these are not: change --max-tokens or --batch-size, "
            "or the data"
        ) from error
    sentences, processes = batches.sentences(SENTENCES), data_parallel_processes(trainer)
    with deterministic(*trained_modules(trainer).values()):
        found = set_omegas(trainer.get_model(), TaskLoss(trainer), sentences, processes)
    for side, omegas in found.items():
        shown = " ".join(f"{omega:.3g}" for omega in omegas)
        logger.info("omega of the %s's %d sublayers: %s", side, len(omegas), shown)


def set_omegas(
    model: nn.Module,
    evaluate: Callable[[Any], object],
    batches: Sequence[Any],
    processes: Processes,
) -> dict[str, list[float]]:
    """Set every omega of a model that has omegas, and LayerNorms with gain 1 and bias 0.

    One after the other in the order of the forward pass, since each changes what later branches
    read. Call this inside `deterministic`; arguments as `variances`.
    """
    found: dict[str, list[float]] = {}
    for stack in stacks(model):
        omegas = found.setdefault(stack.side, [])
        total = 1.0
        for index, branch in enumerate(stack.branches):
            omegas.append(math.sqrt(total))
            nn.init.constant_(getattr(cast(Any, branch.layer).shortcuts, branch.name), omegas[-1])
            ((shortcut, output),) = variances([branch], evaluate, batches, processes)
            # What LayerNorms put out has variance 1.
            total = (shortcut if index == 0 else total) + output
    return found
