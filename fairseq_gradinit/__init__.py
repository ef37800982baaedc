"""GradInit (Zhu et al., NeurIPS 2021): train Transformers without warmup, and other nets too.

With fairseq, name this package as `--user-dir fairseq_gradinit`. Without it, call
`fairseq_gradinit.initialize` on any torch model.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairseq_gradinit.initialization import initialize as initialize

__version__ = "0.1.0"

# fairseq imports a --user-dir for its side effects. A program that uses only the engine has not
# imported fairseq, and is spared it.
if "fairseq" in sys.modules:
    import fairseq_gradinit.plugin.install  # noqa: F401


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, and most of the program `fairseq-gradinit` does without.
    if name == "initialize":
        from fairseq_gradinit.initialization import initialize

        return initialize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
