"""What fairseq imports by name; no test calls it."""


def f1_score(*_: object, **__: object) -> float:
    raise NotImplementedError


matthews_corrcoef = f1_score
