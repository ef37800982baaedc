"""GradInit's batches: thirds that overlap, from training's data, without disturbing training."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import digest

from fairseq_gradinit.errors import GradInitError

PAD = 1


@pytest.fixture
def make_trainer():
    """A trainer that has just what `PairedBatches` asks for, over sentences of given lengths."""
    from fairseq.data import Dictionary, LanguagePairDataset
    from fairseq.tasks.fairseq_task import FairseqTask

    def make(lengths, seed=1, rank=0, processes=1):
        rng = torch.Generator().manual_seed(0)
        tokens = [torch.randint(4, 99, (n,), generator=rng) for n in lengths]
        dictionary = Dictionary()
        for i in range(99):
            dictionary.add_symbol(str(i))
        sizes = np.array(lengths)
        data = LanguagePairDataset(tokens, sizes, dictionary, tokens, sizes, dictionary)
        task = FairseqTask(SimpleNamespace())
        task.datasets["train"] = data
        task.max_positions = lambda: (64, 64)
        return SimpleNamespace(
            task=task,
            cuda=False,
            device=torch.device("cpu"),
            data_parallel_rank=rank,
            data_parallel_world_size=processes,
            get_model=lambda: SimpleNamespace(max_positions=lambda: (64, 64)),
            cfg=SimpleNamespace(
                dataset=SimpleNamespace(
                    train_subset="train", required_batch_size_multiple=1, max_tokens=None
                ),
                common=SimpleNamespace(seed=seed),
            ),
        )

    return make


def paired(trainer, max_tokens=60, max_sentences=None, micro_batches=1):
    from fairseq_gradinit.plugin.batches import PairedBatches

    return PairedBatches(trainer, max_tokens, max_sentences, micro_batches)


def ids(samples):
    return [set(batch.sample["id"].tolist()) for batch in samples]


def test_the_batches_of_a_pair_share_half_of_their_sentences(make_trainer):
    for pair in itertools.islice(paired(make_trainer([6] * 90), micro_batches=3), 20):
        assert len(pair.first) == len(pair.second) == 3
        for first, second in zip(ids(pair.first), ids(pair.second), strict=True):
            assert len(first) == len(second) == 6
            assert len(first & second) == 3
        assert len(set.union(*ids(pair.first))) >= 12


def test_processes_share_what_one_process_would_draw(make_trainer):
    lengths = [5, 6, 7] * 40
    alone = paired(make_trainer(lengths), micro_batches=4)
    shares = [paired(make_trainer(lengths, rank=r, processes=2), micro_batches=2) for r in (0, 1)]
    for whole, even, odd in itertools.islice(zip(alone, *shares, strict=False), 8):
        for all_of, *parts in (
            (whole.first, even.first, odd.first),
            (whole.second, even.second, odd.second),
        ):
            both = zip(*map(ids, parts), strict=True)
            assert ids(all_of) == [one for each in both for one in each]


def test_token_counts_are_those_of_the_cut_batch(make_trainer):
    lengths = [3, 4, 5, 6, 7, 8] * 15
    for pair in itertools.islice(paired(make_trainer(lengths)), 10):
        for sample in (batch.sample for batch in (*pair.first, *pair.second)):
            expected = [lengths[i] for i in sample["id"].tolist()]
            assert sample["ntokens"] == sum(expected) == int((sample["target"] != PAD).sum())
            assert sample["nsentences"] == len(expected)
            assert sample["target"].shape[1] == max(expected)


def test_a_batch_is_shuffled_before_the_cut(make_trainer):
    """Else S would always hold the short sentences of a batch, and S~ the long ones."""
    lengths = list(range(3, 12)) * 10
    differences = []
    for pair in itertools.islice(paired(make_trainer(lengths), max_sentences=9), 60):
        groups = ids(pair.first + pair.second)
        one, other = (np.mean([lengths[i] for i in group]) for group in groups)
        differences.append(one - other)
    assert min(differences) < 0 < max(differences)


def test_all_the_data_are_used_and_again_in_another_order(make_trainer):
    pairs = paired(make_trainer([6] * 90), max_tokens=54)
    seen = [frozenset(set.union(*ids(p.first + p.second))) for p in itertools.islice(pairs, 20)]
    assert set.union(*map(set, seen[:10])) == set(range(90))
    assert set(seen[:10]) == set(seen[10:])
    assert seen[:10] != seen[10:]


def test_sentences_of_equal_shapes_share_small_batches_and_do_not_count_as_drawn(
    make_trainer, monkeypatch
):
    monkeypatch.setattr("fairseq_gradinit.plugin.batches.SMALL_BATCH", 48)

    def chosen(count, **options):
        trainer = make_trainer([6] * 90, **options)
        data = trainer.task.dataset("train")
        data.tgt = [tokens[: 3 + i % 3] for i, tokens in enumerate(data.tgt)]
        pairs = paired(trainer)
        before = pairs.digest()
        found = pairs.sentences(count)
        assert pairs.digest() == before
        return found

    found = chosen(90)
    assert sorted(len(batch.indices) for batch in found) == [*[6] * 3, *[8] * 9]
    assert set.union(*ids(found)) == set(range(90))
    for batch in found:
        assert set(batch.indices) == set(batch.sample["id"].tolist())
        assert not (batch.sample["target"] == PAD).any()
    assert ids(chosen(8)) == ids(chosen(8, processes=2, rank=1))
    assert len(set.union(*ids(chosen(8)))) == 8


def test_the_seed_decides_and_the_digest_tells(make_trainer):
    def draw(seed):
        pairs = paired(make_trainer([3, 5, 7] * 30, seed))
        found = [
            digest([b.sample for b in (*p.first, *p.second)]) for p in itertools.islice(pairs, 5)
        ]
        return found, pairs.digest()

    assert draw(1) == draw(1)
    assert draw(1)[0] != draw(2)[0]
    assert draw(1)[1] != draw(2)[1]


def test_training_finds_its_iterator_as_it_left_it(make_trainer):
    """Also with a task that ignores `disable_iterator_cache`, such as
    fairseq's translation_multi_simple_epoch.
    """
    trainer = make_trainer([3, 5, 7] * 30)
    task, data = trainer.task, trainer.task.dataset("train")
    stock = task.get_batch_iterator

    def cached(dataset, **options):
        random.seed(1)
        if dataset not in task.dataset_to_epoch_iter:
            task.dataset_to_epoch_iter[dataset] = stock(dataset, **options)
        return task.dataset_to_epoch_iter[dataset]

    task.get_batch_iterator = cached
    before = random.getstate()
    batches = paired(trainer, max_tokens=30)
    assert random.getstate() == before
    assert task.dataset_to_epoch_iter == {}
    training = cached(data, max_tokens=90)
    again = paired(trainer, max_tokens=30)
    assert again.plan_digest() == batches.plan_digest()
    assert task.dataset_to_epoch_iter == {data: training}
    assert training.next_epoch_idx == 1


# Fewer than three in a batch; too long for a batch of GradInit, or of training.
@pytest.mark.parametrize(
    ("long", "ours", "training"), [(50, 60, None), (40, 20, 30), (40, 100, 30)]
)
def test_sentences_that_are_too_long_are_left_out(make_trainer, long, ours, training):
    trainer = make_trainer([long] * 10 + [5] * 40)
    trainer.cfg.dataset.max_tokens = training
    for pair in itertools.islice(paired(trainer, max_tokens=ours), 20):
        assert min(min(group) for group in ids(pair.first)) >= 10


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([25] * 40, {"max_tokens": 60}, r"only 0 of the 20 batches .* raise --gradinit-max-tokens"),
        ([25] * 40, {"max_tokens": 9}, r"only 0 of the 0 .* raise --gradinit-max-tokens \(now 9\)"),
        ([5] * 40, {"max_tokens": 60, "micro_batches": 9}, "fill only 4 .* and 9 or more"),
        ([5] * 4, {"max_tokens": None, "max_sentences": 4}, "lower .* or --batch-size"),
    ],
)
def test_too_few_or_too_small_batches_are_refused(make_trainer, lengths, options, message):
    with pytest.raises(GradInitError, match=message):
        paired(make_trainer(lengths), **options)


@pytest.mark.parametrize(
    "batches", [iter([]), SimpleNamespace(frozen_batches=(([1, 2], [3, 4]), ([5, 6], [7, 8])))]
)
def test_streams_and_grouped_data_are_refused(make_trainer, batches):
    trainer = make_trainer([5] * 40)
    trainer.task.get_batch_iterator = lambda **_: batches
    with pytest.raises(GradInitError, match="grouped data of LanguagePairDataset do not allow"):
        paired(trainer)
