"""What the cost benchmarks run, and how they measure time and peak memory.

The model is a post-LN encoder-decoder Transformer of plain PyTorch. Dropout is 0 in training too,
and the batches have no padding, so that a training step does no work that GradInit leaves out.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_gradinit.engine import (
    BatchPair,
    GradInitConfig,
    LossFunction,
    Precision,
    SecondOrder,
    collect_blocks,
)
from fairseq_gradinit.engine.learner import ScaleLearner

ETA = 1e-4
ALWAYS_VIOLATED = 1e-30
"""A gamma below every gradient norm: all iterations are constraint iterations."""


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of a batch: `layers` on each side, all sentences of one `length`."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    vocabulary: int
    sentences: int
    length: int


class Translator(nn.Module):
    """Post-LN Transformer with one embedding for source, target and output, learned positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        depths = (size.layers, size.layers)
        self.transformer = nn.Transformer(
            size.width, size.heads, *depths, size.feed_forward, dropout=0.0, batch_first=True
        )
        nn.init.normal_(self.embedding.weight, std=size.width**-0.5)
        nn.init.normal_(self.positions.weight, std=size.width**-0.5)
        causal = nn.Transformer.generate_square_subsequent_mask(size.length)
        self.register_buffer("causal", causal)

    def forward(self, source: Tensor, previous: Tensor) -> Tensor:
        states = self.transformer(
            self._embed(source), self._embed(previous), tgt_mask=self.causal, tgt_is_causal=True
        )
        return functional.linear(states, self.embedding.weight)

    def _embed(self, tokens: Tensor) -> Tensor:
        width = self.embedding.embedding_dim
        return self.embedding(tokens) * width**0.5 + self.positions.weight


def new_model(size: Size) -> Translator:
    """The same on every call."""
    torch.manual_seed(1)
    return Translator(size)


def batch_pair(size: Size, seed: int = 1) -> BatchPair:
    """Batches S and S~ that share half of their sentences; each has the size of a batch.

    A batch is a source of shape (sentences, length) and a target of shape (sentences, 1 + length).
    """
    rng = torch.Generator().manual_seed(seed)
    half = size.sentences // 2
    shape = (size.sentences + half, size.length + 1)
    device = torch.get_default_device()
    source, target = (
        torch.randint(size.vocabulary, shape, generator=rng, device="cpu").to(device)
        for _ in range(2)
    )
    rows = slice(0, size.sentences), slice(half, half + size.sentences)
    first, second = ((source[part, 1:], target[part]) for part in rows)
    return BatchPair([first], [second])


def loss_of(model: Translator) -> LossFunction:
    """Label-smoothed cross entropy summed over the tokens, and their number."""

    def summed(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        source, target = batch
        scores = model(source, target[:, :-1]).flatten(0, 1)
        wanted = target[:, 1:].flatten()
        loss = functional.cross_entropy(scores, wanted, reduction="sum", label_smoothing=0.1)
        return loss, len(wanted)

    return summed


def config_for(
    gamma: float = math.inf,
    second_order: SecondOrder = "auto",
    lr: float = 1e-4,
    precision: Precision = "fp32",
) -> GradInitConfig:
    """A small `lr` keeps the model where it is, however often an iteration is repeated."""
    return GradInitConfig(
        eta=ETA, lr=lr, gamma=gamma, second_order=second_order, precision=precision
    )


def learner_on(size: Size, config: GradInitConfig, kind: type = ScaleLearner, *more: Any) -> Any:
    """The engine on a new model, or PlainGradInit."""
    model = new_model(size)
    return kind(collect_blocks({"": model}, config.norm_gains), loss_of(model), config, *more)


Step = Callable[[], None]
Contender = Callable[[], Step]
"""Sets up something to measure, and returns what runs it once."""


def training_step(size: Size, precision: Precision = "fp32") -> Step:
    """Forward, backward, Adam."""
    model = new_model(size)
    loss, pair = loss_of(model), batch_pair(size)
    adam = torch.optim.Adam(model.parameters(), lr=ETA)
    device = torch.get_default_device().type

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            total, count = loss(pair.first[0])
        (total / count).backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    return run


def seconds_for(run: Step) -> float:
    _await_device()
    start = time.perf_counter()
    run()
    _await_device()
    return time.perf_counter() - start


def _await_device() -> None:
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def interleaved_seconds(
    contenders: Mapping[Any, Contender], repetitions: int
) -> dict[Any, list[float]]:
    """Times of the contenders, taken in turn so that a change of the machine's speed hits all."""
    runs = {name: new() for name, new in contenders.items()}
    for run in runs.values():
        run()
    turns = [{name: seconds_for(run) for name, run in runs.items()} for _ in range(repetitions)]
    return {name: [turn[name] for turn in turns] for name in contenders}


def peak_memory(contender: Contender) -> int:
    """Most bytes of tensors alive at once from the set-up of the model to the end of two calls.

    Two, because the state of an optimizer is made at the end of the first. On a CPU from the
    profiler's list of all allocations and frees: exact, and the same on every run.
    """
    gc.collect()
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run = contender()
        run()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run = contender()
        run()
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))
