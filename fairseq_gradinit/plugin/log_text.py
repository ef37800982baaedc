"""What a user reads about a GradInit run: log lines, the table of scales, the signature."""

from __future__ import annotations

import math
from typing import Any

import torch

from fairseq_gradinit import __version__
from fairseq_gradinit.engine import Iteration
from fairseq_gradinit.plugin.options import Plan
from fairseq_gradinit.scales import BlockScale, Scales, kinds_of_blocks
from fairseq_gradinit.versions import fairseq_distribution


def iteration_stats(iteration: Iteration, gamma: float) -> dict[str, Any]:
    """One iteration as the values of one log line; a progress bar has room for the first two."""
    trial = {} if iteration.trial_loss is None else {"trial_loss": round(iteration.trial_loss, 4)}
    return {
        **trial,
        "loss": round(iteration.loss, 4),
        "min_scale": round(iteration.min_scale, 3),
        "max_scale": round(iteration.max_scale, 3),
        "gnorm": round(iteration.grad_norm, 2),
        "gamma": gamma if math.isfinite(gamma) else "off",
        "kind": iteration.kind,
    }


def scale_table(scales: Scales) -> list[str]:
    """The scales by kind of block, as lines of text; one column for each layer."""
    groups = kinds_of_blocks(scales)
    width = max(len(kind) for kind in groups)
    lines = [f"{'scales by kind of block':{width}}  first layer to last"]
    for kind, blocks in groups.items():
        cells = [_cell(block) for block in blocks]
        if all(block.state != "learned" for block in blocks):
            cells = [f"{blocks[0].scale:g} ({', '.join(sorted({b.state for b in blocks}))})"]
        lines.append(f"{kind:{width}}  {' '.join(cells)}")
    return lines


def _cell(block: BlockScale) -> str:
    return f"{block.scale:.2f}" if block.state == "learned" else "-"


def signature(
    plan: Plan, cfg: Any, model: str, data: str, device: str, second_order: str | None = None
) -> str:
    """One line that names everything that determines the scales.

    Args:
        model: fingerprint of the initial weights.
        data: fingerprint of the batches used.
        device: where it ran.
        second_order: how products with the Hessian were taken; None for what `plan` says.
    """
    config = plan.config
    fields: dict[str, Any] = {
        "gradinit": __version__,
        "preset": plan.preset,
        "optimizer": config.target,
        **({"clip-norm": f"{config.clip_norm:g}"} if math.isfinite(config.clip_norm) else {}),
        "eta": f"{config.eta:g}",
        "second-order": second_order or config.second_order,
        "gamma": f"{config.gamma:g}" if config.constrained else "off",
        "iterations": config.iterations,
        "lr": f"{config.lr:g}",
        "betas": ",".join(f"{beta:g}" for beta in config.betas),
        "scales": f"{config.min_scale:g}..{config.max_scale:g}",
        "bias-scales": f"{config.min_bias_scale:g}..{config.max_scale:g}",
        "norm-gains": config.norm_gains,
        "centering": "on" if plan.centering else "off",
        **(
            {"encoder-branches": f"{plan.encoder_branches:g}"} if plan.encoder_branches != 1 else {}
        ),
        **({"scale-loaded": "on"} if plan.scale_loaded else {}),
        "tokens": f"{plan.max_tokens or '-'}",
        "sentences": f"{plan.max_sentences or '-'}",
        "micro-batches": plan.micro_batches,
        "processes": cfg.distributed_training.distributed_world_size,
        "seed": cfg.common.seed,
        "task": task_name(cfg),
        "criterion": getattr(cfg.criterion, "_name", "-"),
        "model": model,
        "data": data,
        "precision": config.precision,
        "device": device,
        "torch": torch.__version__,
        "fairseq": fairseq_version(),
    }
    return "|".join(f"{name}:{value}" for name, value in fields.items())


def task_name(cfg: Any) -> str:
    return str(getattr(cfg.task, "_name", None) or cfg.task.task)


def fairseq_version() -> str:
    """Version of the installed fairseq and the distribution it came from."""
    found = fairseq_distribution()
    return f"{found[1]} ({found[0]})" if found else "checkout"
