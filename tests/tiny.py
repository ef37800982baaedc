"""A miniature model, its data, and independent truth about them, for tests of the engine."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fairseq_gradinit.engine.batch_pairs import BatchPair
from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.gradients import LossFunction
from fairseq_gradinit.engine.learner import ScaleLearner
from fairseq_gradinit.engine.processes import Processes
from fairseq_gradinit.errors import GradInitError


class Attention(nn.Module):
    """Embedding, post-LN attention and a tied output projection, in miniature."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(8, 11)
        self.out.weight = self.embed.weight
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias, std=0.1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.dropout(self.attention(x, x, x, need_weights=False)[0]))
        return self.out(x)


def make_model(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return Attention().double()


def make_pair(seed: int = 5) -> BatchPair:
    rng = torch.Generator().manual_seed(seed)
    parts = [torch.randint(11, (2, 5), generator=rng) for _ in range(3)]
    # Two micro-batches each, of different sizes.
    return BatchPair([parts[0], parts[1][:1]], [parts[1], parts[2][:1]])


def loss_of(model: nn.Module):
    def loss(tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
        logits = model(tokens[:, :-1])
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        )
        return total, float(tokens[:, 1:].numel())

    return loss


# What happens to a loss that depends on a parameter.
SPOILERS = {
    "nan": lambda loss, parameter: loss * math.nan,
    "infinity": lambda loss, parameter: loss * math.inf,
    # 0, with derivative infinity times 0.
    "gradient": lambda loss, parameter: loss + (0.0 * parameter).sum().sqrt(),
}


def mean_loss(model: nn.Module, batches) -> torch.Tensor:
    totals, counts = zip(*(loss_of(model)(batch) for batch in batches), strict=True)
    return torch.stack(totals).sum() / sum(counts)


def gradients(model: nn.Module, batches) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(mean_loss(model, batches), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def loss_after(model: nn.Module, direction, eta: float, batches) -> torch.Tensor:
    """The mean loss once the weights have moved by eta against `direction`; they come back."""
    saved = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, d in zip(model.parameters(), direction, strict=True):
            p.sub_(eta * d)
    value = mean_loss(model, batches)
    with torch.no_grad():
        for p, s in zip(model.parameters(), saved, strict=True):
            p.copy_(s)
    return value


def central_differences(learner: ScaleLearner, model: nn.Module, function) -> torch.Tensor:
    """d function / d scale of every learned block, at the present weights m_i W_i."""
    initial = [p.detach().clone() for p in model.parameters()]
    learned = [i for i, block in enumerate(learner.weights.blocks) if block.learned]
    base = [initial[i] / m for i, m in zip(learned, learner.weights.scales.tolist(), strict=True)]
    found, h = [], 1e-5
    for i, w in zip(learned, base, strict=True):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                learner.weights.blocks[i].parameter.copy_(initial[i] + sign * h * w)
            values.append(float(function().detach()))
        with torch.no_grad():
            learner.weights.blocks[i].parameter.copy_(initial[i])
        found.append((values[0] - values[1]) / (2 * h))
    return torch.tensor(found, dtype=torch.float64)


def make_learner(model: nn.Module, loss: LossFunction | None = None, **settings) -> ScaleLearner:
    config = GradInitConfig(**{"eta": 0.05, "norm_gains": "learned", **settings})
    blocks = collect_blocks({"": model}, config.norm_gains)
    return ScaleLearner(blocks, loss or loss_of(model), config)


def move_away_from_one(learner: ScaleLearner, pair: BatchPair) -> None:
    for _ in range(3):
        learner.step(pair)


class ThreadProcesses:
    """One rank of several that are threads of this process: see `Processes` and `in_ranks`.

    The ranks take turns. One runs until it waits in a collective, so that they do not compete for
    what all threads share: random number generators, and torch's choice of attention kernels.
    """

    def __init__(
        self, rank: int, given: list[Any], turn: threading.Lock, barrier: threading.Barrier
    ) -> None:
        self.rank, self.count = rank, len(given)
        self._given, self._turn, self._barrier = given, turn, barrier

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        given = self._exchange("sum", [tensor.clone() for tensor in tensors])
        for tensor, parts in zip(tensors, zip(*given, strict=True), strict=True):
            tensor.copy_(torch.stack(parts).sum(0))

    def max_(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self._exchange("max", tensor.clone())).amax(0))

    def gather(self, text: str) -> list[str]:
        return self._exchange("gather", text)

    def _exchange(self, name: str, value: Any) -> list[Any]:
        """What all ranks give to this collective, in their order."""
        self._given[self.rank] = name, value
        self._turn.release()
        try:
            self._barrier.wait(60)
            names, values = zip(*self._given, strict=True)
            # Nobody gives to the next collective before all have read.
            self._barrier.wait(60)
        except threading.BrokenBarrierError:
            lost = f"process {self.rank} of {self.count} lost the others in {name}"
            raise GradInitError(lost) from None
        finally:
            self._turn.acquire()
        assert set(names) == {name}
        return list(values)


def in_ranks(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What `work` returns in each of `count` ranks; raises the error that happened first."""
    turn, barrier = threading.Lock(), threading.Barrier(count)
    given: list[Any] = [None] * count
    found: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        with turn:
            try:
                found[rank] = work(ThreadProcesses(rank, given, turn, barrier))
            except BaseException as error:
                errors.append(error)
                barrier.abort()

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found
