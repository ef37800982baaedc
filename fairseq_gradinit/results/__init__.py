"""Records of training runs, and the tables and pictures that are made of them.

`RunRecord` is one run with its settings, losses, scores and circumstances; recipes append records
to a file of JSON lines, `read_runs` reads several of them. `current_circumstances` says when, where
and with what a number was measured. `tables` prints Markdown, `heat_map` draws sweeps (it needs
matplotlib, and is imported by those who draw).
"""

from fairseq_gradinit.results.circumstances import Circumstances, current_circumstances, source
from fairseq_gradinit.results.records import (
    MARGIN,
    Comparison,
    Curve,
    RunRecord,
    Settings,
    TestScores,
    append_run,
    curve,
    read_runs,
    trains,
)

__all__ = [
    "MARGIN",
    "Circumstances",
    "Comparison",
    "Curve",
    "RunRecord",
    "Settings",
    "TestScores",
    "append_run",
    "current_circumstances",
    "curve",
    "read_runs",
    "source",
    "trains",
]
