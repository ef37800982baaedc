"""Records of training runs, and the tables that are made of them."""

from fairseq_gradinit.results.circumstances import Circumstances, current_circumstances, source
from fairseq_gradinit.results.records import (
    MARGIN,
    Comparison,
    RunRecord,
    Settings,
    TestScores,
    append_run,
    curve,
    read_runs,
)

__all__ = [
    "MARGIN",
    "Circumstances",
    "Comparison",
    "RunRecord",
    "Settings",
    "TestScores",
    "append_run",
    "current_circumstances",
    "curve",
    "read_runs",
    "source",
]
