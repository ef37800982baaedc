"""The batches of the self-check's probes, and the sentences that are looked at between updates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.session import TrainingBatches

GROUPS, SENTENCES = 8, 4
"""Groups of sentences of one size that are looked at, and sentences in each."""

SCANNED = 20_000
"""Training sentences among which they are looked for."""

TOKENS = 2000
"""That they have together at most, if the run has no --max-tokens."""


class ProbeData:
    """The training batches of a run, in its order, the same ones for every probe.

    Attributes:
        looked: samples of a few training sentences each. Those of a sample are of the same size,
            so there is no padding, which would count as tokens, and they can trade sources.

    Raises:
        GradInitError: the data are streamed, or have no sentence.
    """

    def __init__(self, trainer: Any) -> None:
        dataset_cfg = trainer.cfg.dataset
        dataset = trainer.task.dataset(dataset_cfg.train_subset)
        batches = TrainingBatches(trainer)
        if batches.indices is None:
            raise GradInitError(
                f"the check looks at sentences by index, which the streaming data of "
                f"{type(dataset).__name__} do not allow: check with indexed data of the same model"
            )
        if not len(batches.indices):
            raise GradInitError("no training sentence fits in a batch: raise --max-tokens")
        indices = np.sort(batches.indices)
        scanned = indices[:: -(-len(indices) // SCANNED)]
        groups = groups_of_one_size(
            {int(i): np.ravel(dataset.size(i)).tolist() for i in scanned},
            dataset_cfg.max_tokens or TOKENS,
        )
        self.looked = [dataset.collater([dataset[i] for i in group]) for group in groups]
        self._source = iter(batches)
        self._drawn: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        """The micro-batches of one update after the other, from the first update on."""
        for i in count():
            if i == len(self._drawn):
                self._drawn.append(next(self._source))
            yield self._drawn[i]


def groups_of_one_size(sizes: Mapping[int, Sequence[int]], tokens: int) -> list[list[int]]:
    """Sentences for the looks: some of each of several sizes, from short to long.

    Args:
        sizes: of each sentence, by its index: the numbers of tokens on each of its sides.
        tokens: that all of them together may have, on the longer side. One group is chosen even if
            it has more.

    Returns:
        Indices; as many groups with SENTENCES of them as there are, at most GROUPS. If no size has
        more than one sentence, the groups have one.
    """
    by_size: dict[Hashable, list[int]] = defaultdict(list)
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
    chosen: dict[int, list[int]] = {}
    left = tokens
    for group in spread:
        left -= 0 if group[0] in chosen else len(group) * max(sizes[group[0]])
        if group[0] in chosen or len(chosen) == GROUPS or (chosen and left < 0):
            continue
        chosen[group[0]] = group
    return list(chosen.values())
