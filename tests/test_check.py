"""`fairseq-gradinit check`: probes of a real training, and what is said and written of them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GRADINIT, Corpus, train_here, usual_options

from fairseq_gradinit.check.probes import groups_of_one_size, token_share
from fairseq_gradinit.check.program import ARMS, DEFAULT, WARMUP, table
from fairseq_gradinit.check.program import GRADINIT as FROM_GRADINIT
from fairseq_gradinit.check.records import Arm, Look, Probe, Update
from fairseq_gradinit.check.verdict import EXIT_STATUS, judge, sentence
from fairseq_gradinit.cli import command
from fairseq_gradinit.storage import parse

UPDATES = 4
LEARNING = ["--gradinit-iterations", "3", "--gradinit"]


@dataclass(frozen=True)
class Checked:
    """What the program did."""

    status: int
    printed: str
    errors: str
    out: Path

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "check.json").read_text())

    def probe(self, arm: Arm, lr: float) -> Probe:
        probes = [parse(Probe, probe) for probe in self.report["probes"]]
        (found,) = (probe for probe in probes if probe.arm == arm and probe.lr == lr)
        return found


def check_here(*words: object, out: Path | None = None) -> Checked:
    """Run the program in this process, and have loggers log again what they did."""
    folder = [] if out is None else ["--out", out]
    printed, errors = io.StringIO(), io.StringIO()
    level = logging.getLogger().level
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        status = command.main(list(map(str, ["check", *folder, *words])))
    logging.getLogger().setLevel(level)
    for name in ("fairseq", "fairseq_gradinit", "fairseq_gradinit.check"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    return Checked(status, printed.getvalue(), errors.getvalue(), out or Path())


@pytest.fixture(scope="module")
def checked(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    folder = tmp_path_factory.mktemp("check")
    options = ["--updates", UPDATES, "--rates", "0.5", "--"]
    training = [corpus.translation, *usual_options(), *LEARNING, "--save-dir", folder / "save"]
    return check_here(*options, "fairseq-train", *training, out=folder / "out")


def test_what_is_printed_and_written_agrees_with_the_status(checked):
    report = checked.report
    arms = [probe["arm"] for probe in report["probes"]]
    asked = report["verdicts"][arms.index(asdict(FROM_GRADINIT))]
    assert checked.status == EXIT_STATUS[asked["outcome"]]
    assert asked["reason"] in report["verdict"]
    assert report["verdict"] in checked.printed
    header, *rows = checked.printed.split("\n\n")[0].splitlines()
    assert header.startswith("lr ")
    assert len(rows) == len(arms) == 6
    names = {path.name for path in checked.out.iterdir()}
    assert names == {"check.json", "check.png", "gradinit_scales.json"}
    assert (checked.out / "check.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in checked.out.parent.iterdir()] == ["out"]


def test_all_starts_see_the_same_batches(checked):
    """The default start with and without warmup, at every rate, begins in the same way."""
    starts = [checked.probe(arm, lr) for arm in (DEFAULT, WARMUP) for lr in (1e-3, 5e-4)]
    assert len({(p.updates[0].loss, p.updates[0].gradient_norm, p.looks[0]) for p in starts}) == 1
    assert len({p.updates[-1].loss for p in starts}) == len(starts)
    scaled = [checked.probe(FROM_GRADINIT, lr) for lr in (1e-3, 5e-4)]
    assert scaled[0].looks[0] == scaled[1].looks[0] != starts[0].looks[0]


def test_the_rate_is_constant_or_rises_over_the_probe(checked):
    def rates(arm: Arm) -> list[float]:
        return [update.lr for update in checked.probe(arm, 1e-3).updates]

    assert rates(DEFAULT) == rates(FROM_GRADINIT) == [1e-3] * UPDATES
    assert rates(WARMUP) == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])


@pytest.mark.parametrize(
    ("arm", "options"), [(DEFAULT, []), (FROM_GRADINIT, GRADINIT)], ids=["default", "gradinit"]
)
def test_a_probe_is_the_beginning_of_the_training(checked, corpus, tmp_path, arm, options):
    base = usual_options("--lr-scheduler", "--total-num-update")
    run = train_here(corpus.translation, tmp_path, "--lr-scheduler", "fixed", *options, base=base)
    trained = [re.findall(r"\b(?:loss|gnorm)=(\S+?),?(?= |$)", update) for update in run.updates]
    probed = checked.probe(arm, 1e-3).updates
    assert [list(map(float, pair)) for pair in trained] == [
        pytest.approx([update.loss, update.gradient_norm], abs=2e-3) for update in probed
    ]


def test_every_layer_and_tensor_is_measured(checked):
    probe = checked.probe(DEFAULT, 1e-3)
    assert probe.layers == ("encoder.layers.0", "decoder.layers.0")
    assert [look.update for look in probe.looks] == [0, 1, 2, 3, 4]
    assert all(0 < share < 1 for look in probe.looks for share in look.shares)
    # A bias that begins at zero is all update after the first one.
    first = dict(zip(probe.tensors, probe.updates[0].step_sizes, strict=True))
    assert first["encoder.layers.0.self_attn.out_proj.bias"] == 1.0
    # Every gain of a LayerNorm, which begins at 1, moves by the learning rate.
    assert first["encoder.layers.0.final_layer_norm.weight"] == pytest.approx(1e-3, rel=0.05)
    assert "decoder.embed_tokens.weight" in first


def test_a_rate_at_which_nothing_can_train_and_a_model_without_a_source(corpus):
    options = ["--updates", 3, "--rates", "1", "--start", "default"]
    lm = ["--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "32"]
    sizes = ["--decoder-layers", "1", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32"]
    left_out = [word for word in usual_options() if word.startswith("--en")]
    usual = usual_options("--arch", "--lr", *left_out)
    training = [corpus.language_model, *usual, *lm, *sizes, "--decoder-attention-heads", "2"]
    done = check_here(*options, "--", *training, "--lr", "300", "--gradinit-eta", "1e-3", *LEARNING)
    assert done.status == 1, done.errors
    says = "from the default initialisation without warmup at lr 300 will not hold: gradients are "
    assert says in done.printed
    assert "encoder" not in done.printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bogus", "3"], "does not take this command line: unrecognized arguments: --bogus 3"),
        (["--init-scheme", "zero-branches"], "leave out --init-scheme"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_refused_in_one_sentence(corpus, words, message):
    done = check_here("--", corpus.translation, *usual_options(), *words)
    assert done.status == 2
    assert message in done.errors
    assert done.errors.startswith("fairseq-gradinit: ")
    assert done.errors.count("\n") == 1
    assert not done.printed


def test_the_share_of_outputs_that_differ_by_a_part_in_a_million():
    torch.manual_seed(0)
    common, own = torch.ones(1, 1, 16).double(), torch.randn(40, 5, 16).double()
    own -= own.mean((0, 1))
    expected = 1e-12 * float(own.square().sum()) / (40 * 5 * 16)
    assert token_share((common + 1e-6 * own).split(13)) == pytest.approx(expected, rel=1e-2)
    assert token_share([torch.ones(3, 4)]) == 0.0


def test_sentences_of_one_size_are_looked_at_together():
    sizes = {i: (3 + i % 5, 4) for i in range(40)} | {99: (50, 50)}
    groups = groups_of_one_size(sizes, tokens=10_000)
    assert len(groups) == 5
    assert all(len(group) == 4 and len({sizes[i] for i in group}) == 1 for group in groups)
    few = groups_of_one_size(sizes, tokens=50)
    assert 1 <= len(few) < 5
    assert sum(max(sizes[i]) for group in few for i in group) <= 50
    assert groups_of_one_size(sizes, tokens=1) == few[:1]
    assert sorted(groups_of_one_size({3: (1,), 5: (2,), 8: (4,)}, 100)) == [[3], [5], [8]]


# ---- What probes say, on curves that are made up.

LAYERS = ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0")


def probe(
    encoder: Sequence[float] = (0.5, 0.4),
    decoder: Sequence[float] = (0.5, 0.3),
    bits: float | None = 0.3,
    losses: tuple[float, float] = (12.0, 9.0),
    lr: float = 1e-3,
    arm: Arm = FROM_GRADINIT,
    diverged: str | None = None,
    layers: tuple[str, ...] = LAYERS,
) -> Probe:
    """With these curves of the last layers; the first one of the encoder is always collapsed."""
    looks = tuple(
        Look(i, losses[i > 0], (0.0, e, d)[: len(layers)], bits)
        for i, (e, d) in enumerate(zip(encoder, decoder, strict=True))
    )
    updates = tuple(Update(lr, losses[0], norm, (0.2, 0.4, 0.1)) for norm in (3.0, 40.0))
    return Probe(arm, lr, ("a", "b", "c"), layers, updates, looks, diverged, 1.0)


@pytest.mark.parametrize(
    ("case", "outcome", "reason"),
    [
        (probe(), "holds", "40% of the encoder's and 30% of the decoder's output"),
        (probe(bits=None), "holds", "30% of the decoder's output depends on the token"),
        (
            probe(decoder=(0.3, 1e-8), bits=0.0),
            "fails",
            "the decoder's output is the same for all tokens",
        ),
        (probe(encoder=(0.5, 5e-7)), "fails", "the encoder's output is the same"),
        # A layer that recovers is not given up.
        (probe((0.5,) * 3, (0.3, 1e-7, 2e-7)), "fails", "the decoder's output is the same"),
        (probe((0.5,) * 3, (0.3, 1e-8, 5e-7)), "cannot tell", "little of the decoder's output"),
        (probe((0.5,) * 3, (0.3, 1e-8, 5e-1)), "holds", "50% of the decoder's output"),
        (probe(losses=(12.0, 12.1)), "fails", "the loss rose from 12.00 to 12.10"),
        (probe(diverged="loss not finite"), "fails", "loss not finite after 2 updates"),
        (probe(encoder=(0.5, 1e-3), bits=0.0), "cannot tell", "little of the encoder's output"),
        (probe(bits=0.01), "cannot tell", "the source is hardly used yet"),
        (probe(layers=()), "cannot tell", "no `layers`"),
    ],
)
def test_an_outcome_has_its_reason(case, outcome, reason):
    verdict = judge(case)
    assert verdict.outcome == outcome
    assert reason in verdict.reason
    says = {"holds": "will hold", "fails": "will not hold", "cannot tell": "may or may not hold"}
    start = f"Training from GradInit without warmup at lr 0.001 {says[outcome]}: "
    assert sentence(case) == f"{start}{verdict.reason}."


def test_a_probe_that_diverged_before_any_look_fails():
    gone = Probe(FROM_GRADINIT, 1e-3, ("a",), (), (), (), "weights not finite", 1.0)
    assert judge(gone).outcome == "fails"
    assert "weights not finite" in judge(gone).reason
    assert table([gone]).splitlines()[1].split()[-1] == "fails"


def test_the_table_is_in_the_order_of_the_rates():
    probes = [probe(lr=lr, arm=arm) for lr in (1e-3, 5e-4, 2e-3) for arm in ARMS]
    header, *rows = table(probes).split("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == [*["0.0005"] * 3, *["0.001"] * 3, *["0.002"] * 3]
    assert header.split() == ["lr", "start", "training", "loss", "encoder", "decoder", "source"]
    columns = ["0.0005", "GradInit", "holds", "12.00 to 9.00", "0.4", "0.3", "0.30"]
    assert [cell.strip() for cell in rows[0].split("  ") if cell] == columns
