"""What a run of GradInit leaves beside its checkpoints.

`Description` lists everything that determines the scales of a run. `Scales` is the file of the
learned scales (SCALES_FILE), with the settings and the iterations that they come from; it loads,
checks, saves and applies them. `Effect` is the file of what the scales did to the norms of the
weights and to the residual branches (EFFECT_FILE). The subcommand `diff`, which compares two runs,
is imported by the program.
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
