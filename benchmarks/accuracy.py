"""How far precision and the way of second-order products move what GradInit descends, and learns.

    python benchmarks/accuracy.py       on one CPU core, about 2 minutes

First the derivative of the gradient norm by the scales, taken in four ways, against what the norm
does when each scale in turn moves by 1 % up and down: the step that an iteration makes. Then whole
runs, whose scales are compared with those in fp32 by exact products, and with those that other
batches give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from cost import GAMMA_SHARE, first_iteration, usual_parser
from record import Table, markdown, read, write
from torch import Tensor
from workload import ALWAYS_VIOLATED, Size, Translator, Workload, learner_of, loss_of, settings

from fairseq_gradinit.blocks import collect_blocks
from fairseq_gradinit.config import GradInitConfig, Precision, SecondOrder
from fairseq_gradinit.quiet import quiet

MOVE = 0.01
"""How far a scale moves in one iteration, at the learning rate of the default preset."""

WAYS: list[tuple[SecondOrder, Precision]] = [
    ("exact", "fp32"),
    ("finite-difference", "fp32"),
    ("exact", "bf16"),
    ("finite-difference", "bf16"),
]


@dataclass(frozen=True)
class Derivative:
    """One way to take the derivative of the gradient norm, against the norm's own change.

    Attributes:
        error: length of the difference of the two vectors, over that of the change.
        cosine: between the two.
        signs: share of the scales for which both have the same sign.
    """

    activation: str
    second_order: SecondOrder
    precision: Precision
    error: float
    cosine: float
    signs: float


@dataclass(frozen=True)
class Run:
    """Scales of a whole run against those of fp32 and exact products.

    Attributes:
        typical, largest: root mean square and maximum of the differences between the scales.
    """

    activation: str
    constrained: bool
    what: str
    typical: float
    largest: float


def derivatives(size: Size) -> list[Derivative]:
    change = change_of_norm(Workload(size))
    found = []
    for second_order, precision in WAYS:
        workload = Workload(size, precision=precision)
        with learner_of(workload, settings(workload, ALWAYS_VIOLATED, second_order)) as learner:
            by_scales = learner.gradient(workload.pair()).by_scales
        found.append(
            Derivative(
                size.activation,
                second_order,
                precision,
                error=float((by_scales - change).norm() / change.norm()),
                cosine=float(torch.cosine_similarity(by_scales, change, dim=0)),
                signs=float((by_scales.sign() == change.sign()).double().mean()),
            )
        )
    return found


def change_of_norm(workload: Workload) -> Tensor:
    """Central differences of the gradient norm over a move of each scale; shape (learned,)."""
    model = workload.model()
    found = []
    with quiet(model):
        for block in collect_blocks({"": model}, GradInitConfig.norm_gains):
            if not block.learned:
                continue
            initial = block.parameter.detach().clone()
            norms = []
            for factor in (1.0 + MOVE, 1.0 - MOVE):
                with torch.no_grad():
                    block.parameter.copy_(initial * factor)
                norms.append(norm_of(workload, model))
            with torch.no_grad():
                block.parameter.copy_(initial)
            found.append((norms[0] - norms[1]) / (2 * MOVE))
    return torch.tensor(found, dtype=torch.float64)


def norm_of(workload: Workload, model: Translator) -> float:
    """The l1 norm of the gradient at the present weights."""
    loss, count = loss_of(model)(workload.pair().first[0])
    gradients = torch.autograd.grad(loss / count, list(model.parameters()))
    return float(torch.stack([g.double().abs().sum() for g in gradients]).sum())


def runs(size: Size, iterations: int, constrained: bool) -> list[Run]:
    workload = Workload(size)
    gamma = GAMMA_SHARE * first_iteration(workload).grad_norm if constrained else float("inf")
    base = replace(
        settings(workload, gamma, "exact", GradInitConfig.lr), eta=1e-3, iterations=iterations
    )
    reference = scales_of(workload, base)
    variants = {"bf16": scales_of(workload, replace(base, precision="bf16"))}
    if constrained:
        ways = replace(base, second_order="finite-difference")
        variants["finite differences"] = scales_of(workload, ways)
        variants["finite differences, bf16"] = scales_of(workload, replace(ways, precision="bf16"))
    variants["other batches"] = scales_of(workload, base, first_seed=10_000)
    return [
        Run(
            size.activation,
            constrained,
            what,
            typical=float((scales - reference).square().mean().sqrt()),
            largest=float((scales - reference).abs().max()),
        )
        for what, scales in variants.items()
    ]


def scales_of(workload: Workload, config: GradInitConfig, first_seed: int = 0) -> Tensor:
    """The scales after the iterations of `config`, each on batches of its own."""
    with learner_of(workload, config) as learner:
        for i in range(config.iterations):
            learner.step(workload.pair(first_seed + i))
        return learner.scales.detach().clone()


def derivative_table(found: Sequence[Derivative]) -> Table:
    rows = [
        [
            d.activation,
            f"{d.second_order}, {d.precision}",
            f"{d.error:.3f}",
            f"{d.cosine:.3f}",
            f"{d.signs:.0%}",
        ]
        for d in found
    ]
    header = ["activation", "derivative of the norm", "relative error", "cosine", "same sign"]
    return Table("The derivative against a move of each scale by 1 %", header, rows)


def run_table(found: Sequence[Run], iterations: int) -> Table:
    rows = [
        [
            r.activation,
            f"{GAMMA_SHARE} of the first norm" if r.constrained else "off",
            r.what,
            f"{r.typical:.4f}",
            f"{r.largest:.4f}",
        ]
        for r in found
    ]
    header = ["activation", "gamma", "instead of fp32, exact", "rms difference", "largest"]
    return Table(f"Scales after {iterations} iterations", header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    options = usual_parser(__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    size, iterations = Size(3, 128, 256, 4, vocabulary=2000, sentences=16, length=24), 60
    if options.quick:
        size, iterations = Size(1, 16, 32, 2, vocabulary=50, sentences=4, length=6), 3
    sizes = [replace(size, activation=activation) for activation in ("relu", "gelu")]
    taken = [d for each in sizes for d in derivatives(each)]
    learned = [r for each in sizes for on in (False, True) for r in runs(each, iterations, on)]
    path = options.results / "accuracy-cpu.json"
    tables = [asdict(derivative_table(taken)), asdict(run_table(learned, iterations))]
    write(
        path,
        {
            "tables": tables,
            "size": asdict(size),
            "derivatives": [*map(asdict, taken)],
            "runs": [*map(asdict, learned)],
        },
    )
    print(markdown(read(path)), end="")


if __name__ == "__main__":
    main()
