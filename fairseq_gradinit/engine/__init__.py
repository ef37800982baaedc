"""GradInit itself, for any torch model: of other packages it imports torch and NumPy alone.

What goes in: a model's parameter tensors as blocks (`collect_blocks`), pairs of batches
(`BatchPair`), a function that gives the loss of a batch, and the settings (`GradInitConfig`). What
comes out of `learn_scales`: one scale for each block, and the record of the iterations; the
model's weights are scaled. Call it inside `deterministic`, which switches off all that is
stochastic. `pair_batches` cuts pairs from any loader, `center_layer_norms` is the step before the
scales, `ProcessGroup` and `require_same_setup` serve data-parallel runs, and `StateFile` keeps
what an interrupted run goes on from.
"""

from fairseq_gradinit.engine.batch_pairs import (
    BatchPair,
    Split,
    overlapping_thirds,
    pair_batches,
    thirds,
)
from fairseq_gradinit.engine.blocks import (
    Block,
    BlockState,
    at_fixed_scales,
    base_weights,
    collect_blocks,
    fingerprint,
    frozen_names,
    set_weights,
)
from fairseq_gradinit.engine.centering import center_layer_norms, layer_norm_biases
from fairseq_gradinit.engine.config import (
    PRECISION_NAMES,
    SECOND_ORDER_NAMES,
    TARGET_NAMES,
    GradInitConfig,
    NormGains,
    Precision,
    SecondOrder,
    TargetName,
)
from fairseq_gradinit.engine.determinism import deterministic, random_state_kept, seed_everything
from fairseq_gradinit.engine.gradients import LossFunction
from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.engine.learning import learn_scales
from fairseq_gradinit.engine.processes import (
    OneProcess,
    Processes,
    ProcessGroup,
    require_same_setup,
)
from fairseq_gradinit.engine.state import StateFile

__all__ = [
    "PRECISION_NAMES",
    "SECOND_ORDER_NAMES",
    "TARGET_NAMES",
    "BatchPair",
    "Block",
    "BlockState",
    "GradInitConfig",
    "Iteration",
    "LossFunction",
    "NormGains",
    "OneProcess",
    "Precision",
    "ProcessGroup",
    "Processes",
    "SecondOrder",
    "Split",
    "StateFile",
    "TargetName",
    "at_fixed_scales",
    "base_weights",
    "center_layer_norms",
    "collect_blocks",
    "deterministic",
    "fingerprint",
    "frozen_names",
    "layer_norm_biases",
    "learn_scales",
    "overlapping_thirds",
    "pair_batches",
    "random_state_kept",
    "require_same_setup",
    "seed_everything",
    "set_weights",
    "thirds",
]
