"""Batches for GradInit, drawn from the run's own training data.

The batches come from the task, but not through the epoch iterator that training uses: drawing from
that one would shift training's order of data. Each batch of sentence indices is cut in thirds
before it is collated, so any sample format is right, and its token counts too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from fairseq import utils

from fairseq_gradinit.engine import (
    BatchPair,
    overlapping_thirds,
    random_state_kept,
    seed_everything,
)
from fairseq_gradinit.errors import GradInitError

# Training shuffles with seed + epoch; this keeps GradInit's batches apart from any epoch's.
SEED_OFFSET = 1_000_003

# Tokens of sentences that are put into one batch without need: too few to want memory for.
SMALL_BATCH = 1024


@dataclass(frozen=True)
class MicroBatch:
    """Sentences of the training data, and what the task's collater makes of them."""

    indices: np.ndarray
    sample: Any


class PairedBatches:
    """Endless pairs S, S~ that share half of their sentences (paper, section 3.3).

    Every batch is shuffled and cut in thirds A, B, C: S = A + B and S~ = B + C.

    Args:
        max_tokens, max_sentences: in a batch before the cut.
        micro_batches: in each of S and S~ of each data-parallel process: R processes with u of them
            draw what one process with R u of them would.

    Raises:
        GradInitError: the data do not give enough batches of three sentences or more.
    """

    def __init__(
        self,
        trainer: Any,
        max_tokens: int | None,
        max_sentences: int | None,
        micro_batches: int,
    ) -> None:
        cfg = trainer.cfg
        self._dataset = trainer.task.dataset(cfg.dataset.train_subset)
        self._processes = trainer.data_parallel_world_size
        self._rank = trainer.data_parallel_rank
        self._drawn = micro_batches * self._processes
        self._seed = cfg.common.seed + SEED_OFFSET
        self._cuda, self._device = trainer.cuda, trainer.device
        self._digest = hashlib.blake2b(digest_size=4)
        with (
            random_state_kept(),
            # There are tasks that ignore `disable_iterator_cache`: they would return training's
            # iterator, or have training use this one.
            patch.object(trainer.task, "dataset_to_epoch_iter", {}),
        ):
            epoch_itr = trainer.task.get_batch_iterator(
                dataset=self._dataset,
                max_tokens=max_tokens,
                max_sentences=max_sentences,
                max_positions=utils.resolve_max_positions(
                    trainer.task.max_positions(),
                    trainer.get_model().max_positions(),
                    cfg.dataset.max_tokens,
                    max_tokens,
                ),
                ignore_invalid_inputs=True,
                seed=self._seed,
                epoch=1,
                disable_iterator_cache=True,
            )
            batches = _index_batches(epoch_itr, self._dataset)
        self._batches = [batch for batch in batches if len(batch) >= 3]
        needed = max(2, self._drawn)
        if len(self._batches) < needed:
            raise GradInitError(_too_few(batches, self._batches, max_tokens, needed))
        # In an order that the size of the batches does not change.
        self._indices = np.sort(np.concatenate(batches))

    def __iter__(self) -> Iterator[BatchPair]:
        rng = np.random.default_rng(self._seed)
        queue: list[np.ndarray] = []

        def draw() -> list[np.ndarray]:
            while len(queue) < self._drawn:
                queue.extend(self._batches[i] for i in rng.permutation(len(self._batches)))
            # Sentences of a batch are sorted by length: unshuffled, S would be the short ones.
            drawn = [rng.permutation(queue.pop(0)) for _ in range(self._drawn)]
            return drawn[self._rank :: self._processes]

        while True:
            halves = zip(*map(overlapping_thirds, draw()), strict=True)
            first, second = (
                [self._micro_batch(indices, self._items(indices), drawn=True) for indices in half]
                for half in halves
            )
            yield BatchPair(first, second)

    def sentences(self, count: int) -> list[MicroBatch]:
        """`count` sentences; those of equal shapes share batches, so that none needs padding.

        The same ones in every process and every time, with the same noise where the data have some;
        apart from the pairs, and not part of their `digest`. No random state is changed.
        """
        rng = np.random.default_rng(self._seed)
        chosen = rng.choice(self._indices, min(count, len(self._indices)), replace=False)
        alike: dict[Hashable, list[tuple[int, Any]]] = {}
        found = []
        with random_state_kept([self._device] if self._cuda else []):
            seed_everything(self._seed)
            for index, item in zip(chosen, self._items(chosen), strict=True):
                shapes = tuple(tensor.shape for tensor in _tensors(item))
                # An item without tensors is like no other.
                alike.setdefault(shapes or index, []).append((index, item))
            for members in alike.values():
                size = max((tensor.numel() for tensor in _tensors(members[0][1])), default=0)
                together = max(1, SMALL_BATCH // max(1, size))
                for start in range(0, len(members), together):
                    indices, items = zip(*members[start : start + together], strict=True)
                    found.append(self._micro_batch(np.array(indices), list(items)))
        return found

    def digest(self) -> str:
        """Fingerprint of all the tensors handed out to this process so far."""
        return self._digest.hexdigest()

    def plan_digest(self) -> str:
        """Fingerprint of which sentences the batches before the cut hold."""
        digest = hashlib.blake2b(digest_size=4)
        for batch in self._batches:
            digest.update(f"{batch.tolist()}".encode())
        return digest.hexdigest()

    def halve(self, batch: MicroBatch) -> list[MicroBatch]:
        """The same sentences in two micro-batches; none when there is only one sentence."""
        middle = len(batch.indices) // 2
        if middle == 0:
            return []
        halves = batch.indices[:middle], batch.indices[middle:]
        return [self._micro_batch(half, self._items(half)) for half in halves]

    def _items(self, indices: np.ndarray) -> list[Any]:
        if getattr(self._dataset, "supports_prefetch", False):
            self._dataset.prefetch(indices)
        return [self._dataset[i] for i in indices]

    def _micro_batch(
        self, indices: np.ndarray, items: list[Any], drawn: bool = False
    ) -> MicroBatch:
        sample = self._dataset.collater(items)
        if drawn:
            for tensor in _tensors(sample):
                self._digest.update(tensor.contiguous().numpy().tobytes())
        return MicroBatch(indices, utils.move_to_cuda(sample) if self._cuda else sample)


def _index_batches(epoch_itr: Any, dataset: Any) -> list[np.ndarray]:
    batches = getattr(epoch_itr, "frozen_batches", None)
    # A stream has none. Of several data sets at once there is a list of batches for each.
    if batches is None or (batches and np.ndim(batches[0][0]) > 0):
        raise GradInitError(
            "GradInit draws sentences by index, which the streaming or grouped data of "
            f"{type(dataset).__name__} do not allow: use a task with indexed data"
        )
    return [np.asarray(batch) for batch in batches]


def _tensors(sample: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    utils.apply_to_sample(found.append, sample)
    return found


def _too_few(
    batches: list[np.ndarray], usable: list[np.ndarray], max_tokens: int | None, needed: int
) -> str:
    now = f" (now {max_tokens})" if max_tokens else " or --batch-size"
    if not batches or len(batches) >= needed:
        return (
            f"GradInit cuts each batch in thirds, but only {len(usable)} of the {len(batches)} "
            f"batches have three sentences or more: raise --gradinit-max-tokens{now}"
        )
    sentences = sum(len(batch) for batch in batches)
    return (
        f"the training data ({sentences} sentences) fill only {len(batches)} GradInit "
        f"batch(es), and {needed} or more are needed: lower --gradinit-max-tokens{now}"
    )
