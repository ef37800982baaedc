"""LayerNorms whose outputs average to zero over the tokens.

What all tokens have in common in the input of a linear layer decides where its first updates go:
Adam moves every weight by the learning rate, and those of all tokens add up along their mean. With
positional embeddings and ReLU, nearly half of the power of a post-LN Transformer's activations is
such a common part at first. The bias of a LayerNorm, which starts at zero, can take it out; see
docs/experiments.md.

Each bias changes the inputs of all later LayerNorms, so every LayerNorm needs a forward pass of its
own. Such a pass repeats what the pass before has computed, unless it is a `Replay`, which makes all
of them together nearly as cheap as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_gradinit.engine.processes import OneProcess, Processes
from fairseq_gradinit.engine.replay import Replay
from fairseq_gradinit.errors import GradInitError

Run = Callable[[], object]
"""The forward pass of a batch."""

TOLERANCE = 1e-4
"""Up to which a replayed mean output is right, relative to its largest element."""


@torch.no_grad()
def center_layer_norms(
    modules: Sequence[nn.Module],
    evaluate: Callable[[Any], object],
    batches: Sequence[Any],
    processes: Processes | None = None,
    chosen: Callable[[nn.Parameter], bool] = lambda bias: True,
) -> int:
    """Set the bias of every LayerNorm to minus the mean of its output without bias.

    One after the other in the order of the forward pass, since each changes the input of the next.
    What the biases were before has no influence. Call this inside `deterministic`.

    Args:
        modules: where to look for LayerNorms (by class name: torch's, fairseq's and apex's). Only
            those with a trainable bias that the first batch passes through are centered.
        evaluate: runs the model on a batch.
        batches: the same ones in every process; without padding, which would count as tokens.
        processes: those that hold the model, each of which must call this function; they share
            the work and end up with the same biases, bit for bit.
        chosen: whether a LayerNorm with this bias is centered.

    Returns:
        How many LayerNorms were centered.

    Raises:
        GradInitError: an output is not finite.
    """
    processes = processes or OneProcess()
    names = {norm: name for root in modules for name, norm in root.named_modules()}
    # In all processes the same, whatever their share of the batches.
    norms = [n for n in _calls(names, partial(evaluate, batches[0])) if chosen(n.bias)]
    if not norms:
        return 0
    runs = [partial(evaluate, batch) for batch in batches[processes.rank :: processes.count]]
    own = _center_by_replay(norms, names, runs, processes)
    wrong = norms[0].bias.new_tensor([not _is_right(own, runs)], dtype=torch.float64)
    processes.max_(wrong)
    if wrong.item():
        _center(norms, names, runs, processes)
    for norm in norms:
        if not torch.isfinite(norm.bias).all():
            raise GradInitError(
                f"the output of {names[norm]} is not finite before training: check how the model "
                "initialises its parameters, and the data"
            )
    return len(norms)


def layer_norm_biases(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The biases that `center_layer_norms` sets."""
    found: list[Any] = [m.bias for root in modules for m in root.modules() if _is_layer_norm(m)]
    return found


@contextmanager
def undone_on_error(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Gives the LayerNorms the biases that they have now back if an error leaves the context."""
    biases = layer_norm_biases(modules)
    before = [bias.detach().clone() for bias in biases]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for bias, values in zip(biases, before, strict=True):
                bias.copy_(values)
        raise


class _Seen(Exception):
    """A forward pass has come as far as it was needed."""


def _center(
    norms: Sequence[Any], modules: Iterable[nn.Module], runs: Sequence[Run], processes: Processes
) -> None:
    """Center `norms` by a forward pass for each of them and each of `runs`."""
    modules = list(modules)
    calls = [_calls(modules, run) for run in runs]
    for norm in norms:
        total = _cleared(norm)
        for run, counted in zip(runs, calls, strict=True):
            _add_outputs(norm, counted[norm], run, total)
        _set_bias(norm, total, processes)


def _center_by_replay(
    norms: Sequence[Any], modules: Iterable[nn.Module], runs: Sequence[Run], processes: Processes
) -> dict[Any, Tensor]:
    """Center `norms`, none of which may be called twice in a run, without computing things twice.

    Returns:
        What `_add_outputs` says of the outputs in this process's runs, without biases; nan for
        those of a run that failed.
    """
    own: dict[Any, Tensor] = {}
    with Replay(modules, norms) as replay:
        passes = [replay.of(run) for run in runs]
        for norm in norms:
            own[norm] = total = _cleared(norm)
            try:
                for again in passes:
                    _add_outputs(norm, 1, again, total)
            except Exception:
                # The other processes must not wait for this one; a plain pass shows what it is.
                total.fill_(torch.nan)
            _set_bias(norm, total.clone(), processes)
            replay.close(norm)
    return own


def _is_right(own: Mapping[Any, Tensor], runs: Sequence[Run]) -> bool:
    """Whether plain passes give the outputs that `_center_by_replay` found."""
    found = {norm: torch.zeros_like(total) for norm, total in own.items()}
    with ExitStack() as hooks:
        for norm, total in found.items():
            add = partial(_add, total)
            handle = norm.register_forward_hook(lambda _, __, output, add=add: add(output))
            hooks.callback(handle.remove)
        for run in runs:
            run()
    for norm, total in found.items():
        total[:-1] -= norm.bias.double() * total[-1]
        expected = own[norm]
        error, largest = (total - expected)[:-1].abs().max(), expected[:-1].abs().max()
        # The counts differ if it was called more than once. nan is never right.
        if total[-1] != expected[-1] or not error <= TOLERANCE * largest:
            return False
    return True


def _cleared(norm: Any) -> Tensor:
    """Zero the bias, and as many zeros as `_add` wants."""
    norm.bias.zero_()
    return torch.zeros(norm.bias.numel() + 1, dtype=torch.float64, device=norm.bias.device)


def _set_bias(norm: Any, total: Tensor, processes: Processes) -> None:
    processes.sum_([total])
    norm.bias.copy_(-total[:-1] / total[-1])


def _add(total: Tensor, output: Tensor) -> None:
    """Add the rows of `output` to `total`, and their number to its last element."""
    rows = output.reshape(-1, output.shape[-1]).double()
    total[:-1] += rows.sum(0)
    total[-1] += len(rows)


def _add_outputs(norm: Any, calls: int, run: Run, total: Tensor) -> None:
    """Do `_add` for the outputs of `norm` in `run`.

    Args:
        calls: how often `run` calls it; what comes after the last time is left out.
    """
    left = calls

    def add(_: nn.Module, __: object, output: Tensor) -> None:
        nonlocal left
        _add(total, output)
        left -= 1
        if not left:
            raise _Seen

    if not calls:
        return
    handle = norm.register_forward_hook(add)
    try:
        with suppress(_Seen):
            run()
    finally:
        handle.remove()


def _calls(modules: Iterable[nn.Module], run: Callable[[], object]) -> Counter[Any]:
    """How often `run` calls each LayerNorm with a trainable bias, by the first call of each."""
    used: Counter[Any] = Counter()

    def note(norm: Any, _: object, output: object) -> None:
        # A user's module of such a name may be something else, with states or several outputs.
        if isinstance(output, Tensor) and output.shape[-1:] == norm.bias.shape:
            used[norm] += 1

    handles = [m.register_forward_hook(note) for m in modules if _is_layer_norm(m)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return used


def _is_layer_norm(module: nn.Module) -> bool:
    bias = getattr(module, "bias", None)
    return (
        "layernorm" in type(module).__name__.lower()
        and isinstance(bias, nn.Parameter)
        and bias.dim() == 1
        and bias.requires_grad
    )
