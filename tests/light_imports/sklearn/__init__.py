"""In place of scikit-learn, whose metrics fairseq imports for two of its tasks.

It and scipy are a third of what fairseq takes to start, which tests have it do hundreds of times.
"""

from . import metrics

__all__ = ["metrics"]
