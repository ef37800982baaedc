"""GradInit (Zhu et al., NeurIPS 2021) for fairseq: train Transformers without warmup.

With fairseq, name this package as `--user-dir fairseq_gradinit`. Without it, the engine works on
any torch model: `fairseq_gradinit.engine.learn_scales`.
"""

import sys

__version__ = "0.1.0"

# fairseq imports a --user-dir for its side effects. A program that uses only the engine has not
# imported fairseq, and is spared it.
if "fairseq" in sys.modules:
    import fairseq_gradinit.plugin  # noqa: F401
