"""GradInit itself, for any torch model: of other packages it imports torch and NumPy alone.

`learn_scales` takes a model's tensors as blocks (`collect_blocks`), pairs of batches (`BatchPair`),
a function that gives the loss of a batch, and the settings (`GradInitConfig`). It scales the
weights, and returns one scale for each block and the record of the iterations. Call it inside
`deterministic`, which switches off all that is stochastic. `center_layer_norms` is the step before.
"""

from fairseq_gradinit.engine.batch_pairs import BatchPair as BatchPair
from fairseq_gradinit.engine.batch_pairs import Split as Split
from fairseq_gradinit.engine.batch_pairs import overlapping_thirds as overlapping_thirds
from fairseq_gradinit.engine.batch_pairs import pair_batches as pair_batches
from fairseq_gradinit.engine.batch_pairs import thirds as thirds
from fairseq_gradinit.engine.blocks import Block as Block
from fairseq_gradinit.engine.blocks import BlockState as BlockState
from fairseq_gradinit.engine.blocks import at_fixed_scales as at_fixed_scales
from fairseq_gradinit.engine.blocks import base_weights as base_weights
from fairseq_gradinit.engine.blocks import collect_blocks as collect_blocks
from fairseq_gradinit.engine.blocks import fingerprint as fingerprint
from fairseq_gradinit.engine.blocks import frozen_names as frozen_names
from fairseq_gradinit.engine.blocks import set_weights as set_weights
from fairseq_gradinit.engine.centering import center_layer_norms as center_layer_norms
from fairseq_gradinit.engine.centering import layer_norm_biases as layer_norm_biases
from fairseq_gradinit.engine.config import PRECISION_NAMES as PRECISION_NAMES
from fairseq_gradinit.engine.config import SECOND_ORDER_NAMES as SECOND_ORDER_NAMES
from fairseq_gradinit.engine.config import TARGET_NAMES as TARGET_NAMES
from fairseq_gradinit.engine.config import GradInitConfig as GradInitConfig
from fairseq_gradinit.engine.config import NormGains as NormGains
from fairseq_gradinit.engine.config import Precision as Precision
from fairseq_gradinit.engine.config import SecondOrder as SecondOrder
from fairseq_gradinit.engine.config import TargetName as TargetName
from fairseq_gradinit.engine.determinism import deterministic as deterministic
from fairseq_gradinit.engine.determinism import random_state_kept as random_state_kept
from fairseq_gradinit.engine.determinism import seed_everything as seed_everything
from fairseq_gradinit.engine.gradients import LossFunction as LossFunction
from fairseq_gradinit.engine.history import Iteration as Iteration
from fairseq_gradinit.engine.learning import learn_scales as learn_scales
from fairseq_gradinit.engine.processes import OneProcess as OneProcess
from fairseq_gradinit.engine.processes import Processes as Processes
from fairseq_gradinit.engine.processes import ProcessGroup as ProcessGroup
from fairseq_gradinit.engine.processes import require_same_setup as require_same_setup
from fairseq_gradinit.engine.state import StateFile as StateFile
