"""Admin: shortcuts weighted so that each sublayer depends on its own branch as in pre-LN.

Liu et al., "Understanding the Difficulty of Training Transformers", EMNLP 2020, section 4:
LayerNorm(omega x + f(x)), with one vector omega for each sublayer, trained like any parameter. It
starts as omega_i^2 = sum over j < i of Var[f_j], the variances being measured with the initial
weights on training data. As in the authors' code (LiyuanLucasLiu/Transformer-Clinic,
modules/transformer_layer.py), omega_1 is 1, and the sum begins with the variance of the embeddings.
The i-th branch makes up about 1/i of the variance of its sublayer's output, while in a stock
post-LN model each makes up about the same part.

`admin` keeps omega, in an architecture of ours. `admin-folded` starts as the very same function in
a plain post-LN model: the gain and bias of the LayerNorm that x comes from take up omega, and the
weights of the branch that read x are divided by it. That is exact, since omega_1, which no
LayerNorm precedes, is 1. It does not train as the same model: Adam moves weights by the learning
rate whatever their size, so the steps of these weights weigh omega times as much as in `admin`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from fairseq_gradinit.branches import Stack, branch_names, stacks, variances
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.phase import data_parallel_processes, trained_modules
from fairseq_gradinit.processes import Processes
from fairseq_gradinit.quiet import quiet
from fairseq_gradinit.schemes.batches import training_batches
from fairseq_gradinit.schemes.shortcuts import attach, weights_of
from fairseq_gradinit.schemes.variants import given, register_variants, require_post_ln, switch
from fairseq_gradinit.task_loss import TaskLoss

logger = logging.getLogger("fairseq_gradinit")

SENTENCES = 32
"""Some hundred tokens, each with every dimension of an output."""

SetOmega = Callable[[Stack, int, float], None]
"""Sets the omega of the branch with this index in its stack."""


def configure(model: Any) -> None:
    """Have a model's configuration build the variant with omega.

    Raises:
        GradInitError: the model is not a post-LN Transformer of fairseq.
    """
    require_post_ln(model, "admin")
    switch(model, "admin")


def configure_folded(model: Any) -> None:
    """Check that omega can be folded into a model.

    Raises:
        GradInitError: LayerNorms do not all stand right before the branches that read them.
    """
    require_post_ln(model, "admin-folded")
    for key in ("encoder_layerdrop", "decoder_layerdrop", "cross_self_attention"):
        if given(model, key):
            raise GradInitError(
                f"--init-scheme admin-folded needs each LayerNorm to be followed by the same "
                f"sublayer always, which --{key.replace('_', '-')} does not keep: leave it out, "
                "or choose --init-scheme admin"
            )


def initialise(trainer: Any) -> None:
    """Measure the branches of the trainer's model, and set its omegas.

    Raises:
        GradInitError: an output is not finite, or there are too few training data.
    """
    _initialise(trainer, fill)


def initialise_folded(trainer: Any) -> None:
    """Measure the branches of the trainer's plain model, and fold the omegas into it.

    Raises:
        GradInitError: see `initialise`.
    """
    _initialise(trainer, fold)


def add_omegas(model: nn.Module) -> None:
    """Give every sublayer of a post-LN model its omega, a trainable vector of ones."""
    for stack in stacks(model):
        for layer in stack.layers:
            width = cast(Any, layer).embed_dim
            names = branch_names(layer)
            attach(layer, {name: nn.Parameter(torch.ones(width)) for name in names})


@torch.no_grad()
def fill(stack: Stack, index: int, omega: float) -> None:
    """Set the omega of a branch in a model that has omegas: see `SetOmega`."""
    branch = stack.branches[index]
    weights_of(branch.layer)[branch.name].fill_(omega)


@torch.no_grad()
def fold(stack: Stack, index: int, omega: float) -> None:
    """Have a plain post-LN model compute what it would with this omega: see `SetOmega`.

    Raises:
        ValueError: it is the first omega, and not 1: no LayerNorm can take it up.
    """
    if index == 0:
        if omega != 1.0:
            raise ValueError(f"the first omega of the {stack.side} is {omega}, not 1")
        return
    for parameter in stack.branches[index - 1].norm.parameters():
        parameter.mul_(omega)
    for linear in stack.branches[index].readers:
        linear.weight.div_(omega)


def set_omegas(
    model: nn.Module,
    set_omega: SetOmega,
    evaluate: Callable[[Any], object],
    batches: Sequence[Any],
    processes: Processes,
) -> dict[str, list[float]]:
    """Set every omega of a post-LN model whose LayerNorms have gain 1 and bias 0.

    One after the other in the order of the forward pass, since each changes what later branches
    read. Call this inside `quiet`.

    Args:
        evaluate: runs the model on a batch.
        batches: the same ones in every process, which share them; without padding.

    Returns:
        The omegas by side, "encoder" or "decoder".

    Raises:
        GradInitError: the output of a branch is not finite.
    """
    found: dict[str, list[float]] = {}
    for stack in stacks(model):
        omegas = found.setdefault(stack.side, [])
        total = 1.0
        for index, branch in enumerate(stack.branches):
            omegas.append(math.sqrt(total))
            set_omega(stack, index, omegas[-1])
            ((shortcut, output),) = variances([branch], evaluate, batches, processes)
            # What LayerNorms put out has variance 1.
            total = (shortcut if index == 0 else total) + output
            if not math.isfinite(total):
                raise GradInitError(
                    f"branch {index + 1} of the {stack.side} does not put out finite numbers "
                    "before training: check how the model initialises its parameters, and the data"
                )
    return found


def _initialise(trainer: Any, set_omega: SetOmega) -> None:
    sentences = training_batches(trainer).sentences(SENTENCES)
    processes = data_parallel_processes(trainer)
    with quiet(*trained_modules(trainer).values()):
        found = set_omegas(trainer.get_model(), set_omega, TaskLoss(trainer), sentences, processes)
    for side, omegas in found.items():
        shown = " ".join(f"{omega:.3g}" for omega in omegas)
        logger.info("omega of the %s's %d sublayers: %s", side, len(omegas), shown)


register_variants("admin", add_omegas)
