"""The first updates of a fairseq run, from its initialisation, watched closely."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fairseq_gradinit.check.records import Arm, Look, Probe, Update
from fairseq_gradinit.engine import deterministic
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.batches import MicroBatch
from fairseq_gradinit.plugin.loss import TaskLoss
from fairseq_gradinit.plugin.session import Session, TrainingBatches, make_update

GROUPS, SENTENCES = 8, 4
"""Groups of sentences of one size that are looked at, and sentences in each."""

SCANNED = 20_000
"""Training sentences among which they are looked for."""

TOKENS = 2000
"""That they have together at most, if the run has no --max-tokens."""

Visit = Callable[[int, Mapping[str, Tensor]], None]
"""Is given the number of updates made, and the trained tensors by name, which it may change."""


class Prober:
    """Runs probes: the first updates of a command line of fairseq-train, see `Session`."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        self._session = Session(words, folder)
        self._looked: list[Any] = []  # the same for all probes
        self._batches: Iterator[Any]

    @property
    def lr(self) -> float:
        """The peak learning rate of the command."""
        return self._session.lr

    def run(
        self,
        arm: Arm,
        lr: float,
        updates: int,
        looked: Collection[int],
        warmup: int | None = None,
        visit: Visit = lambda update, tensors: None,
    ) -> Probe:
        """Make that many updates from the initialisation.

        Args:
            looked: the numbers of updates after which the model is looked at, beside 0.
            warmup: updates in which the learning rate rises, if not the whole probe, or none of it.
            visit: called before the first look, and after each update.

        Raises:
            GradInitError: GradInit cannot work on this run, or memory ran out.
        """
        start = time.monotonic()
        if warmup is None:
            warmup = updates if arm.warmup else 0
        trainer = self._session.trainer(lr, warmup)
        if not self._looked:
            batches = TrainingBatches(trainer)
            self._looked, self._batches = looked_at(trainer, batches), iter(batches)
        self._batches, batches_of_probe = tee(self._batches)
        if arm.start == "gradinit":
            self._session.run_gradinit(trainer)
        trainer.begin_epoch(1)
        watched = Watched(trainer, self._looked)
        made: list[Update] = []
        looks: list[Look] = []
        diverged = None
        visit(0, watched.tensors)
        try:
            looks.append(watched.look())
            for samples in batches_of_probe:
                update = watched.update(samples)
                if update is None:
                    continue
                made.append(update)
                visit(len(made), watched.tensors)
                if len(made) in looked:
                    looks.append(watched.look())
                if len(made) >= updates:
                    break
        except FloatingPointError as error:
            diverged = str(error).partition("\n")[0]
        seconds = round(time.monotonic() - start, 1)
        names = tuple(watched.tensors), watched.layers
        return Probe(arm, lr, *names, tuple(made), tuple(looks), diverged, seconds)


# ---- The sentences that are looked at between updates.


def looked_at(trainer: Any, batches: TrainingBatches) -> list[Any]:
    """Samples of a few training sentences each.

    Those of a sample are of the same size, so there is no padding, and they can trade sources.

    Raises:
        GradInitError: the data are streamed.
    """
    dataset_cfg = trainer.cfg.dataset
    dataset = trainer.task.dataset(dataset_cfg.train_subset)
    if batches.indices is None:
        raise GradInitError(
            f"the check looks at sentences by index, which the streaming data of "
            f"{type(dataset).__name__} do not allow: check with indexed data of the same model"
        )
    indices = np.sort(batches.indices)
    scanned = indices[:: -(-len(indices) // SCANNED)]
    groups = groups_of_one_size(
        {int(i): np.ravel(dataset.size(i)).tolist() for i in scanned},
        dataset_cfg.max_tokens or TOKENS,
    )
    return [dataset.collater([dataset[i] for i in group]) for group in groups]


def groups_of_one_size(sizes: Mapping[int, Sequence[int]], tokens: int) -> list[list[int]]:
    """Sentences for the looks: some of each of several sizes, at most GROUPS of SENTENCES.

    Args:
        sizes: numbers of tokens of each sentence's sides, by its index.
        tokens: that all may have on the longer side; one group is chosen even if it has more.
    """
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, size in sizes.items():
        by_size[tuple(size)].append(index)
    most = min(SENTENCES, max(map(len, by_size.values())))
    full = sorted(
        (group[:most] for group in by_size.values() if len(group) >= most),
        key=lambda group: max(sizes[group[0]]),
    )
    # In an order that spreads any first few of them over the lengths.
    spread = [full[round(place * (len(full) - 1))] for place in (0.5, 0.25, 0.75, 0, 1)]
    spread += full[:: -(-len(full) // GROUPS)]
    chosen: list[list[int]] = []
    for group in spread:
        if group in chosen or len(chosen) == GROUPS:
            continue
        tokens -= len(group) * max(sizes[group[0]])
        if tokens >= 0 or not chosen:
            chosen.append(group)
    return chosen


# ---- Updates and looks.


class Watched:
    """A trainer whose updates are measured, and whose model can be looked at between them.

    Attributes:
        tensors: the trained parameter tensors, by name.
        layers: names of the layers whose outputs were looked at: the items of module lists that
            are called `layers`.
    """

    def __init__(self, trainer: Any, looked: Sequence[Any]) -> None:
        model = trainer.get_model()
        self.tensors: dict[str, Tensor] = {
            name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad
        }
        self.layers: tuple[str, ...] = ()
        self._layers: dict[str, nn.Module] = {
            f"{name}.{i}": layer
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers"
            for i, layer in enumerate(module)
        }
        self._trainer = trainer
        self._evaluate = TaskLoss(trainer)
        self._looked = [trainer._prepare_sample(sample)[0] for sample in looked]
        two_sided = hasattr(model, "encoder") and hasattr(model, "decoder")
        self._traded = [*map(_with_sources_traded, self._looked)] if two_sided else []

    def update(self, samples: Any) -> Update | None:
        """Make an update, see `make_update`; FloatingPointError if anything is not finite."""
        tensors = list(self.tensors.values())
        before = [tensor.detach().clone() for tensor in tensors]
        lr = self._trainer.get_lr()
        made = make_update(self._trainer, samples)
        if made is None:
            return None
        loss, norm = _finite("loss", made[0]), _finite("gradient", made[1])
        return Update(lr, loss, norm, _step_sizes(before, tensors))

    def look(self) -> Look:
        """Look at the model, and leave no trace; FloatingPointError if the loss is not finite."""
        trainer = self._trainer
        with deterministic(trainer.get_model(), trainer.get_criterion()), torch.no_grad():
            with _outputs(self._layers) as outputs:
                loss = self._loss(self._looked)
            source_bits = None
            if self._traded and None not in self._traded:
                source_bits = self._loss(self._traded) - loss
        self.layers = tuple(outputs)
        shares = tuple(map(token_share, outputs.values()))
        return Look(trainer.get_num_updates(), loss, shares, source_bits)

    def _loss(self, samples: Sequence[Any]) -> float:
        """In bits per unit of sample size."""
        results = [self._evaluate(MicroBatch(np.empty(0), sample)) for sample in samples]
        total, size = (sum(map(float, column)) for column in zip(*results, strict=True))
        return _finite("loss", total / size / math.log(2))


@contextmanager
def _outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Of the layers that are called inside, by name in the order of the first call."""
    outputs: dict[str, list[Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Any) -> None:
            # Decoder layers return attention weights too.
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                outputs.setdefault(name, []).append(first.detach())

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def token_share(outputs: Sequence[Tensor]) -> float:
    """1 - |mean x|^2 / mean |x|^2, which is 0 when every token has the same output x.

    Args:
        outputs: of a layer, of shapes (..., channels).
    """
    # What is left of a collapse may be less than fp32 sums resolve.
    rows = [output.flatten(0, -2).double() for output in outputs]
    squares = sum(float(each.square().sum()) for each in rows)
    total = reduce(torch.add, (each.sum(0) for each in rows))
    common = float(total.square().sum()) / sum(map(len, rows))
    return max(0.0, 1 - common / squares) if squares else 0.0


def _with_sources_traded(sample: Any) -> Any:
    """Every sentence gets the source of the one before it, of the same length; None if alone."""
    tokens = sample["net_input"].get("src_tokens", ())
    if len(tokens) < 2:
        return None
    return {**sample, "net_input": {**sample["net_input"], "src_tokens": tokens.roll(1, 0)}}


@torch.no_grad()
def _step_sizes(before: list[Tensor], after: list[Tensor]) -> tuple[float, ...]:
    """See `Update.step_sizes`; to four digits, of which there are thousands in a report."""
    now = [tensor.detach().float() for tensor in after]
    changes = torch._foreach_sub(now, [tensor.float() for tensor in before])
    norms = [torch.stack(torch._foreach_norm(each)) for each in (changes, now)]
    ratios = norms[0] / norms[1].clamp_min(torch.finfo(torch.float32).tiny)
    return tuple(float(f"{_finite('weights', ratio):.4g}") for ratio in ratios.tolist())


def _finite(what: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise FloatingPointError(f"{what} not finite")
    return number
