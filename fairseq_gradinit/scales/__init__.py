"""What a run of GradInit leaves beside its checkpoints.

`Scales` are the learned scales, with the settings and the iterations that they come from, and
`Effect` is what they did. `Description` lists everything that determines the scales of a run.
"""

from fairseq_gradinit.scales.description import Description
from fairseq_gradinit.scales.effect import EFFECT_FILE, Change, Effect, Snapshot, effect_between
from fairseq_gradinit.scales.file import (
    SCALES_FILE,
    BlockScale,
    Scales,
    kinds_of_blocks,
    scales_file,
    size_changes,
    some,
)

__all__ = [
    "EFFECT_FILE",
    "SCALES_FILE",
    "BlockScale",
    "Change",
    "Description",
    "Effect",
    "Scales",
    "Snapshot",
    "effect_between",
    "kinds_of_blocks",
    "scales_file",
    "size_changes",
    "some",
]
