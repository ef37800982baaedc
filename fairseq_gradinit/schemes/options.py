"""`--init-scheme`: which schemes there are, and what each does to a run."""
# No postponed annotations here: fairseq reads the types of dataclass fields as objects.

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.option_values import read_value
from fairseq_gradinit.options import read_options, refuse_unsupported
from fairseq_gradinit.schemes import admin, deepnorm, metainit, pre_ln, t_fixup, zero_branches


@dataclass(frozen=True)
class Scheme:
    """An initialisation, as a change to the configuration of the model, to its weights, or to both.

    Attributes:
        configure: changes the model's configuration before the model is built.
        initialise: changes the weights of a trainer's model before the first update.
        sets_weights: whether it determines the scale of weights, as GradInit does.
    """

    configure: Callable[[Any], None] | None = None
    initialise: Callable[[Any], None] | None = None
    sets_weights: bool = True


SCHEMES = {
    "pre-ln": Scheme(configure=pre_ln.configure, sets_weights=False),
    "zero-branches": Scheme(initialise=zero_branches.initialise),
    "deepnorm": Scheme(configure=deepnorm.configure),
    "t-fixup": Scheme(configure=t_fixup.configure),
    "admin": Scheme(configure=admin.configure, initialise=admin.initialise),
    "admin-folded": Scheme(configure=admin.configure_folded, initialise=admin.initialise_folded),
    "metainit": Scheme(initialise=partial(metainit.initialise, iterations=metainit.ITERATIONS)),
}

SchemeChoice = ChoiceEnum(list(SCHEMES))


@dataclass
class SchemeOptions(FairseqDataclass):
    """The options; None stands for the stock initialisation."""

    init_scheme: Optional[SchemeChoice] = field(  # type: ignore[valid-type]
        default=None,
        metadata={
            "help": "start a fresh run from another initialisation than fairseq's, in place of "
            "GradInit; see docs/rivals.md for what each does, and for those whose architecture "
            "is not stock fairseq's"
        },
    )
    init_scheme_iterations: Optional[int] = field(
        default=None,
        metadata={
            "help": "how often metainit moves the norms of the weight matrices "
            f"(default: {metainit.ITERATIONS})"
        },
    )


def read_scheme(cfg: Any) -> Scheme | None:
    """The scheme that a fairseq configuration asks for; None when it asks for none.

    Raises:
        GradInitError: it asks for something else that does not go with the scheme.
    """
    # Programs of other projects pass through here too, with configurations of their own.
    task = getattr(cfg, "task", None)
    name: str | None = _read("init_scheme", task)
    iterations = _iterations(task, name)
    if name is None:
        return None
    scheme = SCHEMES[name]
    if not scheme.sets_weights:
        return scheme
    if read_options(task).gradinit:
        raise GradInitError(
            f"--init-scheme {name} and --gradinit both set the scale of the initial weights, and "
            "the later would undo the earlier: leave one of the two out"
        )
    refuse_unsupported(cfg, f"--init-scheme {name}")
    if iterations is not None:
        return replace(scheme, initialise=partial(metainit.initialise, iterations=iterations))
    return scheme


def _iterations(task: Any, name: str | None) -> int | None:
    iterations: int | None = _read("init_scheme_iterations", task)
    if iterations is None:
        return None
    if name != "metainit":
        raise GradInitError(
            "--init-scheme-iterations is for --init-scheme metainit alone: leave it out"
        )
    if iterations < 1:
        raise GradInitError(f"--init-scheme-iterations must be at least 1, not {iterations}")
    return iterations


def _read(name: str, task_cfg: Any) -> Any:
    return read_value(SchemeOptions.__dataclass_fields__[name], task_cfg)
