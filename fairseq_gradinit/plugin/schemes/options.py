"""`--init-scheme`: which schemes there are, and what each does to a run."""
# No postponed annotations here: fairseq reads the types of dataclass fields as objects.

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.options import read_options, read_value
from fairseq_gradinit.plugin.plan import refuse_unsupported
from fairseq_gradinit.plugin.schemes.admin import add_omegas, measure_omegas
from fairseq_gradinit.plugin.schemes.deepnorm import deepnorm
from fairseq_gradinit.plugin.schemes.t_fixup import t_fixup
from fairseq_gradinit.plugin.schemes.variants import (
    choose_pre_ln,
    choose_variant,
    register_variants,
)
from fairseq_gradinit.plugin.schemes.zero_branches import zero_branches
from fairseq_gradinit.plugin.trainer import full_precision, weights_come_from_checkpoint

logger = logging.getLogger("fairseq_gradinit")

register_variants("deepnorm", deepnorm)
register_variants("t_fixup", t_fixup, of=["transformer"])
register_variants("admin", add_omegas)


@dataclass(frozen=True)
class Scheme:
    """An initialisation, which may set the scale of the weights, as GradInit does.

    `configure` changes the model's configuration before the model is built, `initialise` the
    weights of a trainer's model before the first update.
    """

    configure: Callable[[Any], None] | None = None
    initialise: Callable[[Any], None] | None = None
    sets_weights: bool = True


SCHEMES = {
    "pre-ln": Scheme(configure=choose_pre_ln, sets_weights=False),
    "zero-branches": Scheme(initialise=lambda trainer: zero_branches(trainer.get_model())),
    "deepnorm": Scheme(configure=partial(choose_variant, scheme="deepnorm")),
    "t-fixup": Scheme(configure=partial(choose_variant, scheme="t_fixup", post_ln=False)),
    "admin": Scheme(partial(choose_variant, scheme="admin"), measure_omegas),
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


def read_scheme(cfg: Any) -> Scheme | None:
    """The scheme that a fairseq configuration asks for; None when it asks for none."""
    # Programs of other projects pass through here too, with configurations of their own.
    task = getattr(cfg, "task", None)
    name = read_value(SchemeOptions.__dataclass_fields__["init_scheme"], task)
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
    return scheme


def run_scheme(trainer: Any, scheme: Scheme) -> None:
    """Initialise the model of fairseq's `trainer`, unless the run resumes from a checkpoint."""
    if scheme.initialise is None:
        return
    name = trainer.cfg.task.init_scheme
    if weights_come_from_checkpoint(trainer):
        logger.info("skipping --init-scheme %s: the weights come from a checkpoint", name)
        return
    start = time.monotonic()
    # Optimizer, its fp32 copies and data-parallel wrapper are made again when next asked for.
    trainer.reinitialize()
    with full_precision(trainer):
        scheme.initialise(trainer)
    logger.info("--init-scheme %s applied (%.1f s)", name, time.monotonic() - start)
