"""What a run will do: fairseq's configuration read, every open value filled in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from fairseq_gradinit.engine import GradInitConfig, Precision
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.optimizers import TrialStep, parse_betas, trial_step
from fairseq_gradinit.plugin.options import (
    OPTION_NAMES,
    PRESETS,
    GradInitOptions,
    Preset,
    read_options,
)


@dataclass(frozen=True)
class Plan:
    """What one run will do, every open value filled in.

    Attributes:
        scales_file: scales to apply instead of learning some by `config`.
        max_tokens, max_sentences: in a GradInit batch before the cut.
        centering: whether LayerNorms are centered; None for what was done to learn `scales_file`.
        encoder_branches: fixed scale of the encoder's residual branches, which a model must have
            if `require_encoder`; 1 learns them.
    """

    preset: str
    config: GradInitConfig
    scales_file: str | None
    max_tokens: int | None
    max_sentences: int | None
    micro_batches: int
    save_interval: int
    centering: bool | None
    encoder_branches: float
    require_encoder: bool
    scale_loaded: bool


def make_plan(cfg: Any) -> Plan | None:
    """Read a fairseq configuration; None when it does not ask for GradInit."""
    # Programs of other projects pass through here too, with configurations of their own.
    options = read_options(getattr(cfg, "task", None))
    if not options.gradinit:
        for name in OPTION_NAMES:
            if getattr(options, name) != getattr(GradInitOptions, name):
                raise GradInitError(
                    f"--{name.replace('_', '-')} was given without --gradinit: add --gradinit, or "
                    "leave it out"
                )
        return None
    refuse_unsupported(cfg, "GradInit")
    preset = PRESETS[options.gradinit_preset]
    branches = _pick(options, preset, "encoder_branches")
    if not 0.0 < branches < math.inf:
        raise GradInitError(
            f"--gradinit-encoder-branches must be a number greater than 0, not {branches}"
        )
    growth = preset.batch_per_training_batch
    max_tokens, sentences = _pick(options, preset, "max_tokens"), cfg.dataset.batch_size
    if max_tokens is None and cfg.dataset.max_tokens is not None:
        max_tokens = math.ceil(growth * cfg.dataset.max_tokens)
    applying = options.gradinit_scales is not None
    centering = _pick(options, preset, "centering") == "on"
    return Plan(
        preset=options.gradinit_preset,
        config=_engine_config(options, preset, cfg),
        scales_file=options.gradinit_scales,
        max_tokens=max_tokens,
        max_sentences=None if sentences is None else math.ceil(growth * sentences),
        micro_batches=cfg.optimization.update_freq[0],
        save_interval=options.gradinit_save_interval,
        centering=None if applying and options.gradinit_centering is None else centering,
        encoder_branches=branches,
        require_encoder=options.gradinit_encoder_branches is not None,
        scale_loaded=options.gradinit_scale_loaded,
    )


def _engine_config(options: GradInitOptions, preset: Preset, cfg: Any) -> GradInitConfig:
    step = TrialStep("adam")
    # Scales from a file are applied whatever the optimizer is.
    if options.gradinit_scales is None:
        step = trial_step(options.gradinit_optimizer, cfg.optimizer)
    eta = _pick(options, preset, "eta")
    # Clipping leaves sign(g) and g/||g|| as they are.
    clip_norm = cfg.optimization.clip_norm if step.target == "sgd" else 0.0
    scales = ("min_scale", "min_bias_scale", "max_scale")
    names = ("gamma", "iterations", "lr", *scales, "norm_gains", "second_order")
    return GradInitConfig(
        eta=peak_lr(cfg) * step.length if eta is None else eta,
        target=step.target,
        clip_norm=clip_norm if clip_norm > 0 else math.inf,
        betas=parse_betas("--gradinit-betas", _pick(options, preset, "betas")),
        precision=cast(Precision, options.gradinit_precision),
        seed=cfg.common.seed,
        **{name: _pick(options, preset, name) for name in names},
    )


def _pick(options: GradInitOptions, preset: Preset, name: str) -> Any:
    value = getattr(options, f"gradinit_{name}")
    return getattr(preset, name) if value is None else value


def peak_lr(cfg: Any) -> float:
    """The highest learning rate that the run's schedule reaches."""
    if getattr(cfg.lr_scheduler, "_name", None) == "triangular":
        return float(cfg.lr_scheduler.max_lr)
    return float(max(cfg.optimization.lr))


def refuse_unsupported(cfg: Any, what: str) -> None:
    """Raise GradInitError where no process has the whole model; `what` does not work there."""
    parallel = cfg.distributed_training
    unsupported = {
        "--ddp-backend fully_sharded": parallel.ddp_backend == "fully_sharded",
        "--ddp-backend slowmo": parallel.ddp_backend == "slowmo",
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--pipeline-model-parallel": parallel.pipeline_model_parallel,
        "--model-parallel-size above 1": cfg.common.model_parallel_size > 1,
    }
    for name, given in unsupported.items():
        if given:
            raise GradInitError(
                f"{what} does not work with {name}: each process must have the whole model and "
                "its global gradient, as with --ddp-backend pytorch_ddp"
            )
    if cfg.common.tpu or cfg.common.bf16:
        raise GradInitError(
            f"{what} does not work with --tpu or --bf16, which fairseq takes to TPUs: use --fp16 "
            "or --amp, or leave it out"
        )
