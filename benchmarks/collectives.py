"""What GradInit moves between processes: counted on two of them, and at the size of WMT'14.

    python benchmarks/collectives.py        about half a minute, two processes
    python benchmarks/collectives.py --quick

Two processes share every kind of iteration over gloo, with a counter around torch.distributed's
collectives. The counts must be those of `Traffic`, which then tells what WMT'14's models would
move; time and memory there are computed from it and from published throughputs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch.distributed
from cost import usual_parser
from fairseq.data import Dictionary
from fairseq.distributed.legacy_distributed_data_parallel import LegacyDistributedDataParallel
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.transformer import TransformerModel
from record import Table, markdown, read, write
from torch import multiprocessing, nn
from workload import ALWAYS_VIOLATED, ETA, Size, Workload, loss_of

from fairseq_gradinit.blocks import collect_blocks
from fairseq_gradinit.centering import center_layer_norms
from fairseq_gradinit.config import GradInitConfig
from fairseq_gradinit.engine import BatchPair, ScaleLearner
from fairseq_gradinit.fixed_scales import fixed_scales
from fairseq_gradinit.processes import ProcessGroup
from fairseq_gradinit.quiet import quiet

PROCESSES = 2
BRANCHES = 0.1
"""Scale of the encoder's branches in the preset `default`, which then is not learned."""


@dataclass(frozen=True)
class Model:
    """What the traffic depends on.

    Attributes:
        parameters: numbers in the trainable tensors, P.
        scales: learned, K.
        norms: widths of the LayerNorms that are centered.
    """

    parameters: int
    scales: int
    norms: tuple[int, ...] = ()


@dataclass(frozen=True)
class Traffic:
    """How many collectives of each kind something does.

    Attributes:
        gradients: sums of the gradient of every parameter, in fp32, 4 P bytes.
        totals: sums of a loss and its count, 16 bytes.
        dots: sums of one number for each scale, 8 K bytes.
        compared: maxima of all scales, their negatives and the wish to stop, 8 (2 K + 1) bytes.
        centered: sums of a LayerNorm's outputs, 8 (width + 1) bytes each, for all of them.
    """

    gradients: int = 0
    totals: int = 0
    dots: int = 0
    compared: int = 0
    centered: int = 0

    def bytes(self, model: Model) -> int:
        """That each process gives to the collectives."""
        return (
            self.gradients * 4 * model.parameters
            + self.totals * 16
            + self.dots * 8 * model.scales
            + self.compared * 8 * (2 * model.scales + 1)
            + self.centered * sum(8 * (width + 1) for width in model.norms)
        )

    def calls(self, model: Model) -> int:
        """For a model whose gradient fits in one bucket, see `fairseq_gradinit.processes`."""
        once = self.gradients + self.totals + self.dots + self.compared
        return once + self.centered * len(model.norms)

    def __str__(self) -> str:
        parts = {
            "4 P": self.gradients,
            "16": self.totals,
            "8 K": self.dots,
            "8 (2 K + 1)": self.compared,
            "sum of 8 (width + 1)": self.centered,
        }
        return " + ".join(f"{n} · {text}" if n > 1 else text for text, n in parts.items() if n)


OBJECTIVE = Traffic(gradients=1, totals=2, dots=1, compared=1)
TRIAL_STEPS = 3
ITERATIONS = {
    "objective": (OBJECTIVE, {}),
    "constraint, finite differences": (
        OBJECTIVE,
        {"gamma": ALWAYS_VIOLATED, "second_order": "finite-difference"},
    ),
    "constraint, double backward": (
        Traffic(gradients=1, totals=1, dots=1, compared=1),
        {"gamma": ALWAYS_VIOLATED, "second_order": "exact"},
    ),
    "objective, through the step": (
        Traffic(gradients=2, totals=2, dots=2, compared=1),
        {"target": "sgd", "through_step": True, "second_order": "exact"},
    ),
    f"objective, trial of {TRIAL_STEPS} steps": (
        Traffic(gradients=TRIAL_STEPS, totals=TRIAL_STEPS + 1, dots=TRIAL_STEPS, compared=1),
        {"trial_steps": TRIAL_STEPS},
    ),
}
BEGIN = "beginning: the weights compared"
CENTERING = "centering, before and after"
TRAINING = "update of training, in fp32"
EXPECTED = {
    BEGIN: Traffic(compared=1),
    CENTERING: Traffic(centered=1),
    **{kind: traffic for kind, (traffic, _) in ITERATIONS.items()},
    TRAINING: Traffic(gradients=1),
}


# ---- Counted.


@dataclass(frozen=True)
class Counted:
    """What rank 0 gave to the collectives."""

    kind: str
    calls: int
    bytes: int


@contextmanager
def counter() -> Iterator[list[int]]:
    """The bytes of every tensor that meanwhile goes through a collective of torch.distributed."""
    sizes: list[int] = []

    def counting(collective: Callable[..., object]) -> Callable[..., object]:
        def call(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
            sizes.append(tensor.numel() * tensor.element_size())
            return collective(tensor, *args, **kwargs)

        return call

    names = ("all_reduce", "broadcast")
    wrapped = {name: counting(getattr(torch.distributed, name)) for name in names}
    with mock.patch.multiple(torch.distributed, **wrapped):
        yield sizes


def model_of(module: nn.Module, norms: Sequence[int] = ()) -> Model:
    """Its sizes, with the settings of the preset `default`."""
    names = {"": module}
    blocks = collect_blocks(names, "fixed", fixed_scales(names, BRANCHES, required=False))
    parameters = sum(block.parameter.numel() for block in blocks)
    return Model(parameters, sum(block.learned for block in blocks), tuple(norms))


def norm_widths(module: nn.Module) -> list[int]:
    return [m.weight.numel() for m in module.modules() if isinstance(m, nn.LayerNorm)]


def count_iteration(workload: Workload, kind: str) -> list[Counted]:
    """Of one iteration, and of the learner's beginning."""
    module = workload.model()
    config = GradInitConfig(eta=ETA, **ITERATIONS[kind][1])
    pair = workload.pair(seed=torch.distributed.get_rank())
    pair = BatchPair(pair.first, pair.second, [pair.first] * (config.trial_steps - 1))
    with quiet(module):
        names = {"": module}
        blocks = collect_blocks(names, "fixed", fixed_scales(names, BRANCHES, required=False))
        with counter() as beginning:
            learner = ScaleLearner(
                blocks, loss_of(module), config, ProcessGroup(), optimizer=torch.optim.Adam
            )
        with counter() as sizes:
            learner.step(pair)
    begun = Counted(BEGIN, len(beginning), sum(beginning))
    return [begun, Counted(kind, len(sizes), sum(sizes))]


def count_centering(workload: Workload) -> Counted:
    module = workload.model()
    loss = loss_of(module)
    with quiet(module), counter() as sizes:
        center_layer_norms([module], loss, workload.pair().first, ProcessGroup())
    return Counted(CENTERING, len(sizes), sum(sizes))


def count_update(workload: Workload) -> Counted:
    """Of the gradients alone, which fairseq's legacy_ddp sums as one tensor."""
    wrapped = LegacyDistributedDataParallel(workload.model(), torch.distributed.group.WORLD)
    loss, _ = loss_of(wrapped.module)(workload.pair().first[0])
    loss.backward()
    with counter() as sizes:
        wrapped.all_reduce_grads()
    return Counted(TRAINING, len(sizes), sum(sizes))


def worker(rank: int, folder: str, workload: Workload) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    found = {CENTERING: count_centering(workload), TRAINING: count_update(workload)}
    for kind in ITERATIONS:
        found.update({counted.kind: counted for counted in count_iteration(workload, kind)})
    if rank == 0:
        rows = [asdict(found[kind]) for kind in EXPECTED]
        Path(folder, "counted.json").write_text(json.dumps(rows), encoding="utf-8")
    torch.distributed.destroy_process_group()
    # gloo's threads may abort an interpreter that ends in order.
    os._exit(0)


def count(workload: Workload) -> list[Counted]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (folder, workload), PROCESSES)
        rows = json.loads(Path(folder, "counted.json").read_text(encoding="utf-8"))
    return [Counted(**row) for row in rows]


def deviations(counted: Sequence[Counted], model: Model) -> list[str]:
    """A sentence for every count that is not the expected one."""
    return [
        f"{found.kind}: {found.calls} collectives of {found.bytes} bytes, expected "
        f"{expected.calls(model)} of {expected.bytes(model)} ({expected})"
        for found in counted
        for expected in [EXPECTED[found.kind]]
        if (found.calls, found.bytes) != (expected.calls(model), expected.bytes(model))
    ]


def counted_table(counted: Sequence[Counted], model: Model, size: Size) -> Table:
    rows = [
        [found.kind, f"{found.calls}", f"{found.bytes:,}", f"{EXPECTED[found.kind]}"]
        for found in counted
    ]
    title = (
        f"Counted, and equal to the formula: {size.layers}+{size.layers} layers, d={size.width}, "
        f"P = {model.parameters:,}, K = {model.scales}"
    )
    return Table(title, ["", "collectives", "bytes", "formula"], rows)


# ---- Computed, for WMT'14.

GB = 1e9


@dataclass(frozen=True)
class Throughput:
    """Tokens a second of the big model, on one machine with 8 GPUs.

    Attributes:
        gradinit: in the precision that GradInit evaluates the loss in.
    """

    machine: str
    training: float
    gradinit: float


@dataclass(frozen=True)
class Batch:
    """Tokens of an update, and the machines of 8 GPUs that share it."""

    tokens: int
    machines: int


# NVIDIA DeepLearningExamples, PyTorch/Translation/Transformer/README.md at d666f14, "Training
# performance results": its transformer_wmt_en_de_big_t2t, mixed precision and fp32. torch's fp32 is
# not the TF32 that the README has for an A100, so GradInit is taken to run in bf16 there, as fast
# as their mixed precision.
THROUGHPUTS = (
    Throughput("8 V100 16 GB, GradInit in fp32", training=214_656, gradinit=59_316),
    Throughput("8 A100 40 GB, GradInit in bf16", training=551_599, gradinit=551_599),
)
# Vaswani et al. 2017, section 5.2: 100,000 steps in 12 hours, 300,000 in 3.5 days, batches alike.
BASE_IS_FASTER = (3.5 * 24 / 300_000) / (12 / 100_000)
VOCABULARY = 32_768
UPDATES = 100_000
ITERATIONS_OF_GRADINIT = 60
NETWORK = 12.5 * GB
"""Bytes a second between two machines: 100 Gbit/s, an assumption."""
BATCHES = (Batch(8 * 4096, machines=1), Batch(128 * 4096, machines=1), Batch(128 * 4096, 16))


def wmt_model(architecture: str) -> Model:
    """The model of the recipes for WMT'14, with a joint vocabulary."""
    args = Namespace(arch=architecture, share_all_embeddings=True)
    ARCH_CONFIG_REGISTRY[architecture](args)
    dictionary = Dictionary()
    for i in range(VOCABULARY - len(dictionary)):
        dictionary.add_symbol(f"{i}")
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    module = TransformerModel.build_model(args, task)
    return model_of(module, norm_widths(module))


def network_seconds(bytes_: float, machines: int) -> float:
    """Of a ring over machines: each gives and takes 2 (M - 1) / M times what is summed."""
    return 2 * (machines - 1) / machines * bytes_ / NETWORK


@dataclass(frozen=True)
class Cost:
    """Hours of a whole run, by the formulas of docs/distributed.md."""

    update: float
    training: float
    gradinit: float


def cost(model: Model, batch: Batch, throughput: Throughput, faster: float) -> Cost:
    """Of `UPDATES` updates in fp16 and `ITERATIONS_OF_GRADINIT` iterations.

    Args:
        faster: than the big model, which the throughputs are of.
    """

    def seconds(tokens_per_second: float) -> float:
        return batch.tokens / (tokens_per_second * faster * batch.machines)

    update = seconds(throughput.training) + network_seconds(2 * model.parameters, batch.machines)
    # Two gradients, of S and of S~, each as large as a batch of training.
    iteration = 2 * seconds(throughput.gradinit)
    iteration += network_seconds(OBJECTIVE.bytes(model), batch.machines)
    return Cost(update / 3600, UPDATES * update / 3600, ITERATIONS_OF_GRADINIT * iteration / 3600)


def traffic_table(models: dict[str, Model]) -> Table:
    rows = []
    for name, model in models.items():
        iteration, update = OBJECTIVE.bytes(model), 2 * model.parameters
        whole = ITERATIONS_OF_GRADINIT * iteration + 2 * Traffic(centered=1).bytes(model)
        rows.append(
            [
                *(name, f"{model.parameters / 1e6:.1f} million", f"{model.scales}"),
                *(f"{iteration / 1e6:.1f}", f"{(iteration - 4 * model.parameters) / 1e3:.1f}"),
                *(f"{update / 1e6:.1f}", f"{whole / GB:.1f}", f"{UPDATES * update / GB:,.0f}"),
            ]
        )
    header = ["", "P", "K", "iteration, MB", "of it not gradients, kB", "update in fp16, MB"]
    header += [f"{ITERATIONS_OF_GRADINIT} iterations, GB", f"{UPDATES:,} updates, GB"]
    return Table("WMT'14, computed: bytes that each process gives to the collectives", header, rows)


def time_table(models: dict[str, Model]) -> Table:
    rows = []
    for name, model in models.items():
        faster = BASE_IS_FASTER if name == "base" else 1.0
        for batch in BATCHES:
            for throughput in THROUGHPUTS:
                found = cost(model, batch, throughput, faster)
                gpus = 8 * batch.machines
                rows.append(
                    [
                        *(name, f"{batch.tokens // 4096} x 4096", f"{gpus}", throughput.machine),
                        *(f"{3600 * found.update:.2f}", f"{found.training:.1f}"),
                        *(f"{gpus * found.training:,.0f}", f"{60 * found.gradinit:.1f}"),
                        f"{found.gradinit / found.training:.2%}",
                    ]
                )
    header = ["", "tokens", "GPUs", "each machine", "s an update", f"h for {UPDATES:,} updates"]
    header += ["GPU hours", "GradInit, minutes", "of training"]
    return Table("WMT'14, computed: time", header, rows)


# Bytes for each parameter. Training in fp16: weights, gradients and the buckets of
# DistributedDataParallel in fp16; weights, gradients and Adam's two moments in fp32. GradInit, in
# fp32: W, m W and a gradient; at the trial step, the direction of the step too.
MEMORY = {
    "training in fp16, 22 P": 3 * 2 + 4 * 4,
    "GradInit in a gradient, 12 P": 3 * 4,
    "GradInit at the trial step, 16 P": 4 * 4,
}


def memory_table(models: dict[str, Model]) -> Table:
    rows = [
        [name, *(f"{factor * model.parameters / GB:.2f}" for factor in MEMORY.values())]
        for name, model in models.items()
    ]
    title = "WMT'14, computed: GB on each GPU, without activations"
    return Table(title, ["", *MEMORY], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    options = usual_parser(__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    size = Size(2, 64, 128, 4, vocabulary=500, sentences=8, length=12)
    if options.quick:
        size = Size(1, 16, 32, 2, vocabulary=50, sentences=4, length=6)
    workload = Workload(size)
    module = workload.model()
    model = model_of(module, norm_widths(module))
    counted = count(workload)
    if wrong := deviations(counted, model):
        sys.exit("\n".join(wrong))
    models = {
        name: wmt_model(f"transformer_wmt_en_de{ending}")
        for name, ending in {"base": "", "big": "_big"}.items()
        if not options.quick
    }
    tables = [counted_table(counted, model, size)]
    tables += [make(models) for make in (traffic_table, time_table, memory_table)]
    path = options.results / "collectives.json"
    results = {
        "tables": [*map(asdict, tables)],
        "size": asdict(size),
        "model": asdict(model),
        "counted": [*map(asdict, counted)],
        "wmt": {name: asdict(model) for name, model in models.items()},
    }
    write(path, results)
    print(markdown(read(path)), end="")


if __name__ == "__main__":
    main()
