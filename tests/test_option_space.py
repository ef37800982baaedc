"""Any values of the options together: a plan that holds, or a sentence that names one of them."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import train_here, usual_options
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict
from test_options import configuration

from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.plan import Plan, make_plan
from fairseq_gradinit.plugin.schemes.options import SCHEMES, read_scheme

OPTIMIZERS = (
    *("adam", "cpu_adam", "adamax", "adagrad", "sgd", "nag"),
    *("adadelta", "adafactor", "composite"),
)
BACKENDS = ("c10d", "fully_sharded", "legacy_ddp", "no_c10d", "pytorch_ddp", "slowmo")

number = st.floats(1e-6, 10) | st.floats() | st.sampled_from([0.0, 1.0, -1.0, math.inf, math.nan])
count = st.integers(1, 9) | st.integers(-3, 2**70) | st.just(10**400)
betas = (
    st.sampled_from(["0.9,0.98", "(0, 0)", "[0.9, 0.999]", "0.9", "1e400,0", "nan,0", "0.9,0.98,1"])
    | st.sampled_from(["1" + "0" * 400 + ",0", "-" * 5000 + "1,0", "(" * 500, "\0", "{}", "1j,0"])
    | st.text(max_size=9)
)


def choice(*names: str) -> st.SearchStrategy[str]:
    return st.sampled_from(names)


# Where an option stands in fairseq's configuration, and the values it is given here.
SPACE: dict[str, st.SearchStrategy[Any]] = {
    "task.gradinit_preset": choice("default", "paper"),
    "task.gradinit_optimizer": choice("auto", "adam", "sgd", "sgd-normalized"),
    "task.gradinit_centering": choice("on", "off"),
    "task.gradinit_encoder_branches": number,
    "task.gradinit_iterations": count,
    "task.gradinit_lr": number,
    "task.gradinit_betas": betas,
    "task.gradinit_eta": number,
    "task.gradinit_gamma": number,
    "task.gradinit_min_scale": number,
    "task.gradinit_min_bias_scale": number,
    "task.gradinit_max_scale": number,
    "task.gradinit_norm_gains": choice("fixed", "learned"),
    "task.gradinit_max_tokens": count,
    "task.gradinit_second_order": choice("auto", "exact", "finite-difference"),
    "task.gradinit_precision": choice("fp32", "bf16"),
    "task.gradinit_max_skipped": count,
    "task.gradinit_save_interval": count,
    "task.gradinit_scales": choice("s.json"),
    "task.init_scheme": choice(*SCHEMES),
    "optimization.lr": st.lists(number, max_size=2),
    "optimization.clip_norm": number,
    "optimization.update_freq": st.lists(count, max_size=2),
    "optimization.use_bmuf": st.booleans(),
    "dataset.max_tokens": st.none() | count,
    "dataset.batch_size": st.none() | count,
    "common.fp16": st.booleans(),
    "common.bf16": st.booleans(),
    "common.amp": st.booleans(),
    "common.memory_efficient_fp16": st.booleans(),
    "common.memory_efficient_bf16": st.booleans(),
    "common.cpu": st.booleans(),
    "common.tpu": st.booleans(),
    "common.model_parallel_size": st.integers(1, 2),
    "common.seed": st.integers(0, 2**32 - 1),
    "distributed_training.ddp_backend": choice(*BACKENDS),
    "distributed_training.distributed_world_size": st.integers(1, 1024),
    "distributed_training.pipeline_model_parallel": st.booleans(),
    "optimizer.adam_betas": betas,
    "optimizer.momentum": number,
}
RARELY = {
    *("task.gradinit_scales", "task.init_scheme", "optimization.use_bmuf"),
    *("common.bf16", "common.tpu", "common.model_parallel_size"),
    *("distributed_training.pipeline_model_parallel",),
}


@pytest.fixture(scope="module")
def usual() -> dict[str, Any]:
    """The configuration of a run with each optimizer."""
    return {optimizer: configuration("--optimizer", optimizer) for optimizer in OPTIMIZERS}


def configured(usual: Any, values: dict[str, Any]) -> Any:
    """A configuration with these values in place of some."""
    cfg = copy.deepcopy(usual)
    with open_dict(cfg):
        for place, value in values.items():
            group, name = place.split(".")
            if group != "optimizer":
                setattr(cfg[group], name, value)
            elif OmegaConf.is_config(cfg.optimizer) and name in cfg.optimizer:
                cfg.optimizer[name] = value
    return cfg


def assert_holds(plan: Plan, values: dict[str, Any]) -> None:
    """What the engine and the drawing of batches take for granted, and what was asked for."""
    assert isinstance(plan.config, GradInitConfig)
    assert 0 < plan.config.eta < math.inf
    assert plan.config.iterations >= 1
    assert plan.config.min_scale <= 1 <= plan.config.max_scale < math.inf
    assert plan.max_tokens is None or plan.max_tokens >= 3
    assert plan.max_sentences is None or plan.max_sentences >= 1
    assert plan.micro_batches >= 1
    assert 0 < plan.encoder_branches < math.inf
    for name in ("iterations", "eta", "gamma", "lr", "max_scale", "second_order", "precision"):
        place = f"task.gradinit_{name}"
        assert getattr(plan.config, name) == values.get(place, getattr(plan.config, name))


@st.composite
def runs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """An optimizer, and values for a few options."""
    usual = st.sets(choice(*(place for place in SPACE if place not in RARELY)), max_size=6)
    places = draw(usual) | draw(st.sets(choice(*RARELY), max_size=1))
    return draw(choice(*OPTIMIZERS)), {place: draw(SPACE[place]) for place in sorted(places)}


def outcome(cfg: Any, values: dict[str, Any]) -> str:
    """Whether the options were accepted, after what must hold was found to hold."""
    try:
        plan = make_plan(cfg)
        read_scheme(cfg)
    except GradInitError as refusal:
        message = str(refusal)
    else:
        if plan is not None:
            assert_holds(plan, values)
        return "accepted" if plan is not None else "not asked for"
    # It names an option in full, or a setting of the engine by its own name.
    flags = [place.partition(".")[2].replace("_", "-") for place in values]
    named = [f"--{flag}" for flag in flags]
    named += [f"{flag.removeprefix('gradinit-')} must" for flag in flags]
    if "tpu" in message:
        named.append("--tpu or --bf16")
    assert any(name in message for name in (*named, "--optimizer")), message
    assert len(message) < 2_000
    return "refused"


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_any_options_give_a_plan_or_a_sentence_that_names_one(examples, usual):
    met: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None)
    @given(run=runs(), gradinit=st.sampled_from([True, True, True, False]))
    def holds(run: tuple[str, dict[str, Any]], gradinit: bool) -> None:
        optimizer, values = run
        cfg = configured(usual[optimizer], values | {"task.gradinit": gradinit})
        met[outcome(cfg, values)] += 1

    holds()
    # One alone would say little.
    assert met["accepted"] > examples / 30
    assert met["refused"] > examples / 30


# Options that a CPU takes, each left out in half of the runs.
DRAWN = {
    "--gradinit-preset": ("default", "paper"),
    "--gradinit-optimizer": ("auto", "adam", "sgd", "sgd-normalized"),
    "--gradinit-centering": ("on", "off"),
    "--gradinit-encoder-branches": ("0.1", "0.5", "1"),
    "--gradinit-gamma": ("inf", "50", "1000"),
    "--gradinit-norm-gains": ("fixed", "learned"),
    "--gradinit-second-order": ("auto", "exact", "finite-difference"),
    "--gradinit-precision": ("fp32", "bf16"),
    "--gradinit-save-interval": ("0", "1"),
    "--gradinit-eta": ("1e-3", "1e-2"),
    "--update-freq": ("2",),
    "--clip-norm": ("0.1",),
    "--ddp-backend": ("legacy_ddp", "no_c10d"),
    "--amp": ("",),
}


def drawn_command(seed: int) -> list[str]:
    """Options of a run that must train, drawn again until they go together."""
    rng = random.Random(seed)
    while True:
        options = ["--optimizer", rng.choice(("adam", "adamax", "adagrad", "sgd", "nag"))]
        for name, values in DRAWN.items():
            if rng.random() < 0.5:
                options += [word for word in (name, rng.choice(values)) if word]
        with contextlib.suppress(GradInitError):
            make_plan(configuration(*options))
            return [*options, "--gradinit-iterations", "2", "--gradinit-max-tokens", "600"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_options_drawn_by_lot_train(seed, corpus, tmp_path):
    base = usual_options("--optimizer", "--adam-betas", "--max-update")
    options = [*drawn_command(seed), "--gradinit", "--max-update", "2", "--no-save"]
    run = train_here(corpus.translation, tmp_path, *options, base=base)
    assert run.code == 0, run.output
    assert len(run.updates) == 2
    assert len(run.lines("| gradinit: ")) == 2
    assert all(torch.isfinite(p).all() for p in run.weights.values())
    assert any(not torch.equal(p, run.initial[name]) for name, p in run.first.items())
