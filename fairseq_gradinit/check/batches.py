"""The sentences that are looked at between updates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
