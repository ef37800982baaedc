"""Several processes find out that they cannot work together before they begin to.

Once they have begun, a process that fails leaves the others waiting for it, and processes that were
started differently give to one collective what belongs to another: gloo aborts the program then, or
they train on, each towards something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from fairseq_gradinit.engine.processes import Processes
from fairseq_gradinit.errors import GradInitError

T = TypeVar("T")


def require_same_setup(
    processes: Processes, prepare: Callable[[], T], describe: Callable[[T], Mapping[str, object]]
) -> T:
    """What `prepare` returns, when it has succeeded in all processes and they describe it alike.

    Args:
        prepare: must not wait for another process.
        describe: what must be the same everywhere, by names that a user can understand.

    Raises:
        GradInitError: `prepare` has raised it in one of them, or they differ; the same in all.
    """
    if processes.count == 1:
        return prepare()
    found: list[T] = []
    description: Mapping[str, object] = {}
    error = ""
    try:
        found.append(prepare())
        description = describe(found[0])
    except GradInitError as raised:
        error = str(raised)
    texts = {name: str(value) for name, value in description.items()}
    told = [json.loads(text) for text in processes.gather(json.dumps([error, texts]))]
    _require_success([error for error, _ in told])
    _require_alike([description for _, description in told])
    return found[0]


def _require_success(errors: Sequence[str]) -> None:
    for rank, error in enumerate(errors):
        if error:
            everywhere = len(set(errors)) == 1
            raise GradInitError(
                error if everywhere else f"process {rank} of {len(errors)}: {error}"
            )


def _require_alike(descriptions: Sequence[Mapping[str, str]]) -> None:
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        differing = [name for name in {**first, **other} if other.get(name) != first.get(name)]
        if differing:
            found = (f"{name} {other.get(name)}, not {first.get(name)}" for name in differing)
            raise GradInitError(
                f"process {rank} of {len(descriptions)} was started otherwise than process 0: it "
                f"has {'; '.join(found)}: start all of them with the same command and seed, on "
                "the same data, with the same versions"
            )
