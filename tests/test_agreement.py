"""Processes that were started differently end with the same error before they begin to learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import SCALES_ALONE, Corpus, Training, train_here
from tiny import in_ranks

from fairseq_gradinit.engine.processes import Processes, require_same_setup
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin import phase

OTHERWISE = "process 1 of 2 was started otherwise than process 0: it has "


def errors_of(count: int, prepare: Callable[[Processes], int]) -> set[str]:
    """The sentences of the ranks, when what they prepare is described as `number`."""

    def work(processes: Processes) -> str:
        with pytest.raises(GradInitError) as raised:
            require_same_setup(
                processes, lambda: prepare(processes), lambda found: {"number": found}
            )
        return str(raised.value)

    return set(in_ranks(count, work))


def test_a_difference_or_an_error_is_the_same_error_in_all():
    assert in_ranks(
        3, lambda p: require_same_setup(p, lambda: [p.rank], lambda _: {"number": 1})
    ) == [[0], [1], [2]]
    (found,) = errors_of(3, lambda processes: processes.rank // 2)
    assert found.startswith("process 2 of 3 was started otherwise than process 0: it has ")
    assert "number 1, not 0: start all of them with the same command and seed" in found

    def prepare(processes: Processes, failing: tuple[int, ...]) -> int:
        if processes.rank in failing:
            raise GradInitError("no data")
        return 0

    assert errors_of(2, partial(prepare, failing=(1,))) == {"process 1 of 2: no data"}
    assert errors_of(2, partial(prepare, failing=(0, 1))) == {"no data"}


# ---- What fairseq-train describes.


def train_one_of_two(
    corpus: Corpus, save_dir: Path, gather: Callable[[str], list[str]], rank: int, *options: str
) -> Training:
    """One rank, which hears from `gather` what both say of themselves."""
    processes = SimpleNamespace(count=2, rank=rank, gather=gather)
    usual = ["--gradinit", *SCALES_ALONE, "--encoder-layers", "1", "--decoder-layers", "1"]
    with mock.patch.object(phase, "data_parallel_processes", return_value=processes):
        return train_here(corpus.translation, save_dir, *usual, *options)


@pytest.fixture(scope="module")
def first(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What rank 0 says of itself, when it does no more."""

    def describe(text: str) -> list[str]:
        said.append(text)
        raise GradInitError("enough")

    said: list[str] = []
    train_one_of_two(corpus, tmp_path_factory.mktemp("first"), describe, 0)
    return said[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seed", "2"], f"{OTHERWISE}seed 2, not 1; weights "),
        (["--gradinit-iterations", "9"], f"{OTHERWISE}iterations 9, not 60: start all of them "),
        (["--max-tokens", "300"], f"{OTHERWISE}tokens 450, not 600; batches "),
        (["--train-subset", "valid"], "process 1 of 2: the training data (40 "),
        (["--gradinit-scales", "/no.json"], "process 1 of 2: cannot read /no.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_everything_that_decides_the_scales_is_compared(corpus, first, tmp_path, options, sentence):
    run = train_one_of_two(corpus, tmp_path, lambda text: [first, text], 1, *options)
    assert run.error().startswith(sentence)
    assert not run.batches
