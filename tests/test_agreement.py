"""Processes that were started differently end with the same error before they begin to learn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from conftest import SCALES_ALONE, Corpus, Training, train_here
from tiny import in_ranks

import fairseq_gradinit
from fairseq_gradinit.engine.agreement import require_same_setup
from fairseq_gradinit.engine.processes import Processes
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin import phase
from fairseq_gradinit.scales import description
from fairseq_gradinit.scales.file import FORMAT

OTHERWISE = "process 1 of 2 was started otherwise than process 0: it has "


def errors_of(
    count: int, prepare: Callable[[Processes], int], name: str = "number"
) -> tuple[str, ...]:
    """The sentence of each rank, when what they prepare is described as `name`."""

    def work(processes: Processes) -> str:
        with pytest.raises(GradInitError) as raised:
            require_same_setup(processes, lambda: prepare(processes), lambda found: {name: found})
        return str(raised.value)

    return tuple(in_ranks(count, work))


def test_ranks_that_describe_themselves_alike_keep_what_they_prepared():
    def work(processes: Processes) -> list[int]:
        return require_same_setup(processes, lambda: [processes.rank], lambda _: {"number": 1})

    assert in_ranks(3, work) == [[0], [1], [2]]


def test_a_difference_is_the_same_error_in_all():
    found = errors_of(3, lambda processes: processes.rank // 2)
    assert len(set(found)) == 1
    assert found[0].startswith("process 2 of 3 was started otherwise than process 0: it has ")
    assert "number 1, not 0: start all of them with the same command and seed" in found[0]


def test_the_error_of_one_is_that_of_all_and_names_it():
    def prepare(processes: Processes) -> int:
        if processes.rank == 1:
            raise GradInitError("no data")
        return 0

    assert errors_of(2, prepare) == ("process 1 of 2: no data",) * 2


def test_the_same_error_of_all_names_none():
    def prepare(processes: Processes) -> int:
        raise GradInitError("no data")

    assert errors_of(2, prepare) == ("no data",) * 2


# ---- What fairseq-train describes.


class Described(Exception):
    """The description of a rank, which ends its run."""


class OneOfTwo:
    """Rank 0, which does no more than describe itself, or rank 1 beside one that has."""

    count = 2

    def __init__(self, first: str | None) -> None:
        self.rank = 0 if first is None else 1
        self.first = first

    def gather(self, text: str) -> list[str]:
        if self.first is None:
            raise Described(text)
        return [self.first, text]


def train_one_of_two(
    corpus: Corpus, save_dir: Path, *arguments: object, first: str | None = None
) -> Training:
    options = ["--gradinit", *SCALES_ALONE, "--encoder-layers", "1", "--decoder-layers", "1"]
    with mock.patch.object(phase, "data_parallel_processes", return_value=OneOfTwo(first)):
        return train_here(corpus.translation, save_dir, *options, *arguments)


@pytest.fixture(scope="module")
def first(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What rank 0 says of itself."""
    with pytest.raises(Described) as described:
        train_one_of_two(corpus, tmp_path_factory.mktemp("first"))
    return str(described.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seed", "2"], f"{OTHERWISE}seed 2, not 1; weights "),
        (["--gradinit-iterations", "9"], f"{OTHERWISE}iterations 9, not 60: start all of them "),
        (["--gradinit-centering", "on"], f"{OTHERWISE}centering True, not False: "),
        (["--max-tokens", "300"], f"{OTHERWISE}tokens 450, not 600; batches "),
        (["--encoder-layers", "2"], f"{OTHERWISE}weights "),
        (["--train-subset", "valid"], "process 1 of 2: the training data (40 "),
        (["--gradinit-scales", "/no.json"], "process 1 of 2: cannot read /no.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_everything_that_decides_the_scales_is_compared(corpus, first, tmp_path, options, sentence):
    run = train_one_of_two(corpus, tmp_path, *options, first=first)
    assert run.error().startswith(sentence)
    assert not run.batches


def test_versions_are_compared(corpus, first, tmp_path, monkeypatch):
    monkeypatch.setattr(description, "__version__", "0.0.9")
    run = train_one_of_two(corpus, tmp_path, first=first)
    expected = f"{OTHERWISE}version 0.0.9, not {fairseq_gradinit.__version__}: "
    assert run.error().startswith(expected)


def test_damaged_scales_of_one_are_an_error_of_all(corpus, first, tmp_path):
    file = tmp_path / "nan.json"
    block = {"name": "encoder.embed_tokens.weight", "shape": [88, 32], "scale": math.nan}
    document = {"format": FORMAT.name, "version": FORMAT.version, "settings": {}, "history": []}
    file.write_text(json.dumps({**document, "blocks": [{**block, "state": "learned"}]}))
    run = train_one_of_two(corpus, tmp_path / "run", "--gradinit-scales", file, first=first)
    assert run.error().startswith(f"process 1 of 2: {file} is damaged: blocks[0].scale: nan")
