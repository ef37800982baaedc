"""What a run will do: fairseq's configuration read, every open value filled in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

from fairseq.optim.lr_scheduler.manual_lr_scheduler import ManualSchedule

from fairseq_gradinit.engine import GradInitConfig, Precision
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.optimizers import TrialStep, parse_betas, trial_step
from fairseq_gradinit.plugin.options import (
    APPLYING,
    PRESETS,
    GradInitOptions,
    Preset,
    flag,
    given_options,
    read_options,
)
from fairseq_gradinit.storage import abbreviate


@dataclass(frozen=True)
class Plan:
    """What one run will do, every open value filled in.

    Attributes:
        preset: name of the preset that filled the open values.
        config: the engine's settings; with `scales_file` they are not used.
        scales_file: file of scales to apply instead of learning.
        max_tokens: tokens in a GradInit batch before the cut, or None.
        max_sentences: sentences in it, or None.
        micro_batches: micro-batches in one gradient.
        save_interval: iterations between two savings of the learning's state; 0 for none.
        centering: whether LayerNorms are centered; None for what was done to learn `scales_file`.
        encoder_branches: fixed scale of the encoder's residual branches; 1 learns them.
        require_encoder: whether a model without such branches is an error.
        scale_loaded: whether tensors that were loaded from files are scaled and centered too.
        unused: options that were given for learning, beside a `scales_file`.
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
    unused: tuple[str, ...] = ()


def make_plan(cfg: Any) -> Plan | None:
    """Read a fairseq configuration; None when it does not ask for GradInit.

    Raises:
        GradInitError: an option is out of its range, or the run uses something that GradInit does
            not support.
    """
    # Programs of other projects pass through here too, with configurations of their own.
    options = read_options(getattr(cfg, "task", None))
    if not options.gradinit:
        if given := given_options(options):
            raise GradInitError(
                f"{flag(given[0])} was given without --gradinit: add --gradinit, or leave it out"
            )
        return None
    refuse_unsupported(cfg, "GradInit")
    if options.gradinit_save_interval < 0:
        raise GradInitError(
            "--gradinit-save-interval must be at least 0, which switches it off, not "
            f"{options.gradinit_save_interval}"
        )
    preset = PRESETS[options.gradinit_preset]
    branches = _pick(options, preset, "encoder_branches")
    if not 0.0 < branches < math.inf:
        raise GradInitError(
            f"--gradinit-encoder-branches must be a number greater than 0, not {branches}"
        )
    growth = preset.batch_per_training_batch
    sentences = _at_least_one("--batch-size", cfg.dataset.batch_size)
    frequency = cfg.optimization.update_freq[0] if cfg.optimization.update_freq else 0
    return Plan(
        preset=options.gradinit_preset,
        config=_engine_config(options, preset, cfg),
        scales_file=options.gradinit_scales,
        max_tokens=_max_tokens(options, preset, cfg),
        max_sentences=None if sentences is None else _times(growth, sentences),
        micro_batches=_at_least_one("--update-freq", frequency),
        save_interval=options.gradinit_save_interval,
        centering=_centering(options, preset),
        encoder_branches=branches,
        require_encoder=options.gradinit_encoder_branches is not None,
        scale_loaded=options.gradinit_scale_loaded,
        unused=_unused(options),
    )


def _unused(options: GradInitOptions) -> tuple[str, ...]:
    if options.gradinit_scales is None:
        return ()
    return tuple(flag(name) for name in given_options(options, APPLYING))


def _engine_config(options: GradInitOptions, preset: Preset, cfg: Any) -> GradInitConfig:
    step = TrialStep("adam")
    # Scales from a file are applied whatever the optimizer is.
    if options.gradinit_scales is None:
        step = trial_step(options.gradinit_optimizer, cfg.optimizer)
    eta = _pick(options, preset, "eta")
    if eta is None:
        eta = peak_lr(cfg) * step.length
        if not 0.0 < eta < math.inf:
            raise GradInitError(
                "--gradinit-eta must be a number greater than 0, and --lr and --optimizer "
                f"make it {eta}: change them, or give it"
            )
    # Clipping leaves sign(g) and g/||g|| as they are.
    clip_norm = cfg.optimization.clip_norm if step.target == "sgd" else 0.0
    return GradInitConfig(
        eta=eta,
        target=step.target,
        clip_norm=clip_norm if clip_norm > 0 else math.inf,
        gamma=_pick(options, preset, "gamma"),
        iterations=_pick(options, preset, "iterations"),
        lr=_pick(options, preset, "lr"),
        betas=parse_betas("--gradinit-betas", _pick(options, preset, "betas")),
        min_scale=_pick(options, preset, "min_scale"),
        min_bias_scale=_pick(options, preset, "min_bias_scale"),
        max_scale=_pick(options, preset, "max_scale"),
        norm_gains=_pick(options, preset, "norm_gains"),
        second_order=_pick(options, preset, "second_order"),
        precision=cast(Precision, options.gradinit_precision),
        max_skipped=options.gradinit_max_skipped,
        seed=cfg.common.seed,
    )


def _centering(options: GradInitOptions, preset: Preset) -> bool | None:
    if options.gradinit_centering is None and options.gradinit_scales is not None:
        return None
    centering: str = _pick(options, preset, "centering")
    return centering == "on"


def _max_tokens(options: GradInitOptions, preset: Preset, cfg: Any) -> int | None:
    found: int | None = _pick(options, preset, "max_tokens")
    name, given = "--gradinit-max-tokens", found
    if found is None and cfg.dataset.max_tokens is not None:
        name, given = "--max-tokens", cfg.dataset.max_tokens
        found = _times(preset.batch_per_training_batch, cfg.dataset.max_tokens)
    if found is not None and found < 3:
        raise GradInitError(f"{name} {given} is too few to cut a batch in thirds")
    return found


def _times(growth: float, size: int) -> int:
    """Rounded up; exact, and so without bounds."""
    return math.ceil(Fraction(growth) * size)


def _at_least_one(name: str, value: Any) -> Any:
    """`value`, where None stands for an option that is not given."""
    if value is not None and value < 1:
        raise GradInitError(f"{name} must be at least 1, not {value}")
    return value


def _pick(options: GradInitOptions, preset: Preset, name: str) -> Any:
    value = getattr(options, f"gradinit_{name}")
    return getattr(preset, name) if value is None else value


def peak_lr(cfg: Any) -> float:
    """The highest learning rate that the run's schedule reaches."""
    schedule = getattr(cfg.lr_scheduler, "_name", None)
    if schedule == "triangular":
        return float(cfg.lr_scheduler.max_lr)
    rates = list(cfg.optimization.lr)
    if schedule == "manual":
        # Without either of the two dictionaries the rate stays --lr.
        rates = _manual_rates(cfg.lr_scheduler) or rates
    return float(max(rates, default=math.nan))


def _manual_rates(schedule: Any) -> list[float]:
    """All rates in the dictionaries of fairseq's schedule that is written down by hand."""
    rates: list[float] = []
    for option in ("epoch2lr", "update2lr"):
        text = getattr(schedule, option)
        try:
            rates += ManualSchedule.parse_manuallr_args(None, text).values()
        except (ValueError, TypeError, SyntaxError, AttributeError) as error:
            raise GradInitError(
                f"--{option} {abbreviate(text)} is no dictionary of learning rates, such as "
                "\"{'1-3': 1e-3, '4': 5e-4}\""
            ) from error
    return rates


def refuse_unsupported(cfg: Any, what: str) -> None:
    """Refuse a run in which no process sees the whole model and its global gradient.

    Args:
        what: what does not work there, as the error says it.

    Raises:
        GradInitError: it is one.
    """
    parallel = cfg.distributed_training
    apart = "its processes train apart, so there is no global gradient: use --ddp-backend"
    whole = "no process holds the whole model, whose gradient GradInit needs: leave one out"
    unsupported = {
        "--ddp-backend fully_sharded": (
            parallel.ddp_backend == "fully_sharded",
            "each process holds a part of each tensor, and a scale belongs to the whole: use "
            "--ddp-backend pytorch_ddp, with --checkpoint-activations if memory is short",
        ),
        "--ddp-backend slowmo": (parallel.ddp_backend == "slowmo", f"{apart} pytorch_ddp"),
        "--use-bmuf": (cfg.optimization.use_bmuf, f"{apart} pytorch_ddp without it"),
        "--pipeline-model-parallel": (parallel.pipeline_model_parallel, whole),
        "--model-parallel-size above 1": (cfg.common.model_parallel_size > 1, whole),
        "--tpu or --bf16": (
            cfg.common.tpu or cfg.common.bf16,
            "fairseq takes both to TPUs: use --fp16 or --amp, or leave it out",
        ),
    }
    for name, (given, advice) in unsupported.items():
        if given:
            raise GradInitError(f"{what} does not work with {name}; {advice}")
