"""Everything that determines the scales of a run, listed once.

The settings in a scales file, what processes compare before they work together, and what tells
whether a saved state is of the same run are made from it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from fairseq_gradinit import __version__
from fairseq_gradinit.engine import GradInitConfig


@dataclass(frozen=True)
class Description:
    """What determines the scales of a run; None for what its caller does not have.

    `weights` (the initial ones), `batches` (which sentences they hold) and the settings of model
    and criterion are fingerprints. `tokens` and `sentences` are those of a batch before its cut in
    thirds, `micro_batches` those of one gradient of one process.
    """

    config: GradInitConfig
    weights: str
    device: str
    preset: str | None = None
    centering: bool | None = None
    encoder_branches: float | None = None
    scale_loaded: bool | None = None
    tokens: int | None = None
    sentences: int | None = None
    micro_batches: int | None = None
    processes: int | None = None
    task: str | None = None
    criterion: str | None = None
    batches: str | None = None
    model_settings: str | None = None
    criterion_settings: str | None = None
    fairseq: str | None = None

    def identity(self) -> dict[str, str]:
        """What a run must have in common with one whose state it continues, or that it works with.

        Not the device: each process has its own.
        """
        # Causes before their effects: the first difference explains the others.
        found = {**asdict(self.config), **asdict(self)}
        del found["config"], found["device"]
        names = {"version": __version__, "torch": torch.__version__, **found}
        return {name.replace("_", "-"): str(value) for name, value in names.items()}

    def settings(self, second_order: str, data: str | None = None) -> dict[str, str]:
        """What determined the scales, for a reader; `data` is a fingerprint of the batches used."""
        config = self.config
        found = {
            "gradinit": __version__,
            "preset": self.preset,
            "optimizer": config.target,
            "clip-norm": config.clip_norm if config.clips else None,
            "eta": config.eta,
            "second-order": second_order,
            "gamma": config.gamma if config.constrained else False,
            "iterations": config.iterations,
            "lr": config.lr,
            "betas": ",".join(map(_shown, config.betas)),
            "scales": f"{config.min_scale:g}..{config.max_scale:g}",
            "bias-scales": f"{config.min_bias_scale:g}..{config.max_scale:g}",
            "norm-gains": config.norm_gains,
            "centering": self.centering,
            "encoder-branches": self.encoder_branches,
            "scale-loaded": self.scale_loaded or None,
            "tokens": self.tokens,
            "sentences": self.sentences,
            "micro-batches": self.micro_batches,
            "processes": self.processes,
            "seed": config.seed,
            "task": self.task,
            "criterion": self.criterion,
            "model": self.weights,
            "data": data,
            "precision": config.precision,
            "device": self.device,
            "torch": torch.__version__,
            "fairseq": self.fairseq,
        }
        return {name: _shown(value) for name, value in found.items() if value is not None}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
