"""What the cost benchmarks run, and how they measure time and peak memory.

The model is a post-LN encoder-decoder Transformer of plain PyTorch. Dropout is 0 in training too,
and the batches have no padding, so that a training step does no work that GradInit leaves out.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from plain_gradinit import PlainGradInit
from torch import Tensor, nn
from torch.nn import functional

from fairseq_gradinit.engine import (
    BatchPair,
    GradInitConfig,
    LossFunction,
    Precision,
    Processes,
    SecondOrder,
    collect_blocks,
    deterministic,
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


@dataclass(frozen=True)
class Batch:
    source: Tensor
    target: Tensor


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


@dataclass(frozen=True)
class Workload:
    """A size on a device: makes models, batches and losses, the same ones on every call."""

    size: Size
    device: str = "cpu"
    precision: Precision = "fp32"

    def model(self) -> Translator:
        torch.manual_seed(1)
        return Translator(self.size).to(self.device)

    def pair(self, seed: int = 1) -> BatchPair:
        """Batches S and S~ that share half of their sentences; each has the size of a batch."""
        rng = torch.Generator().manual_seed(seed)
        size = self.size
        half = size.sentences // 2
        shape = (size.sentences + half, size.length + 1)
        source, target = (
            torch.randint(size.vocabulary, shape, generator=rng).to(self.device) for _ in range(2)
        )
        rows = slice(0, size.sentences), slice(half, half + size.sentences)
        first, second = (Batch(source[part, 1:], target[part]) for part in rows)
        return BatchPair([first], [second])

    def autocast_loss(self, model: Translator) -> LossFunction:
        """`loss_of`, for those who leave the precision to the loss."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")(
            loss_of(model)
        )

    def config(
        self, gamma: float = math.inf, second_order: SecondOrder = "auto", lr: float = 1e-4
    ) -> GradInitConfig:
        """A small `lr` keeps the model where it is, however often an iteration is repeated."""
        return GradInitConfig(
            eta=ETA, lr=lr, gamma=gamma, second_order=second_order, precision=self.precision
        )

    @contextmanager
    def learner(
        self, config: GradInitConfig, processes: Processes | None = None
    ) -> Iterator[ScaleLearner]:
        """The engine on a new model."""
        model = self.model()
        with deterministic(model):
            blocks = collect_blocks({"": model}, config.norm_gains)
            yield ScaleLearner(blocks, loss_of(model), config, processes)

    @contextmanager
    def plain_learner(self, config: GradInitConfig) -> Iterator[PlainGradInit]:
        """The baseline on a new model."""
        model = self.model()
        with deterministic(model):
            blocks = collect_blocks({"": model}, config.norm_gains)
            yield PlainGradInit(blocks, self.autocast_loss(model), config)


def loss_of(model: Translator) -> LossFunction:
    """Label-smoothed cross entropy summed over the tokens, and their number."""

    def summed(batch: Batch) -> tuple[Tensor, int]:
        wanted = batch.target[:, 1:]
        scores = model(batch.source, batch.target[:, :-1])
        loss = functional.cross_entropy(
            scores.flatten(0, 1), wanted.flatten(), reduction="sum", label_smoothing=0.1
        )
        return loss, wanted.numel()

    return summed


Contender = Callable[[], AbstractContextManager[Callable[[], None]]]
"""Sets up something to measure; the value of the context runs it once."""


@contextmanager
def training_step(workload: Workload) -> Iterator[Callable[[], None]]:
    """Forward, backward, Adam."""
    model = workload.model()
    loss, pair = workload.autocast_loss(model), workload.pair()
    adam = torch.optim.Adam(model.parameters(), lr=ETA)

    def run() -> None:
        total, count = loss(pair.first[0])
        (total / count).backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    yield run


@contextmanager
def iteration(
    workload: Workload, config: GradInitConfig, plain: bool = False
) -> Iterator[Callable[[], None]]:
    """One iteration of the engine, or of the baseline."""
    with (workload.plain_learner if plain else workload.learner)(config) as learner:
        yield partial(learner.step, workload.pair())


@dataclass(frozen=True)
class Seconds:
    """Times of one call, over the repetitions."""

    median: float
    lowest: float
    highest: float


def wait_for(device: str) -> None:
    """Wait until the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_for(run: Callable[[], object], device: str, calls: int = 1) -> float:
    """Wall clock time of one of `calls` calls in a row, the device's work included."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait_for(device)
    return (time.perf_counter() - start) / calls


@dataclass(frozen=True)
class Schedule:
    """How often to measure; `calls` in a row are one, which lets a GPU run ahead as it would."""

    warmup: int
    repetitions: int
    calls: int = 1


Name = TypeVar("Name")


def interleaved_seconds(
    contenders: Mapping[Name, Contender], schedule: Schedule, device: str
) -> dict[Name, Seconds]:
    """Times of the contenders, taken in turn so that a change of the machine's speed hits all."""
    times: dict[Name, list[float]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        runs = {name: stack.enter_context(new()) for name, new in contenders.items()}
        for run in runs.values():
            seconds_for(run, device, schedule.warmup)
        for _ in range(schedule.repetitions):
            for name, run in runs.items():
                times[name].append(seconds_for(run, device, schedule.calls))
    return {name: Seconds(median(t), min(t), max(t)) for name, t in times.items()}


def peak_memory(contender: Contender, device: str) -> int:
    """Most bytes of tensors alive at once from the set-up of the model to the end of two calls.

    Two, because the state of an optimizer is made at the end of the first.
    """

    def life() -> None:
        with contender() as run:
            run()
            run()
            wait_for(device)

    gc.collect()
    if device == "cuda":
        life()  # What libraries allocate once, and keep, is in what was there before.
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        life()
        return torch.cuda.max_memory_allocated() - before
    # From the profiler's list of all allocations and frees: exact, and the same on every run.
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        life()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
