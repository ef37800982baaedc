"""What the first updates of a training say about it, on curves that are made up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fairseq_gradinit.check.program import ARMS, GRADINIT, table
from fairseq_gradinit.check.records import Arm, Look, Probe, Update
from fairseq_gradinit.check.verdict import judge, sentence

LAYERS = ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0")


def probe(
    encoder: Sequence[float] = (0.5, 0.4),
    decoder: Sequence[float] = (0.5, 0.3),
    bits: float | None = 0.3,
    losses: tuple[float, float] = (12.0, 9.0),
    lr: float = 1e-3,
    arm: Arm = GRADINIT,
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


def test_a_layer_that_recovers_is_not_given_up():
    """As warmup's decoder does, which goes down to 0.002 and comes back."""
    assert judge(probe(decoder=(0.3, 1e-7, 2e-7), encoder=(0.5,) * 3)).outcome == "fails"
    assert judge(probe(decoder=(0.3, 1e-8, 5e-7), encoder=(0.5,) * 3)).outcome == "cannot tell"
    assert judge(probe(decoder=(0.3, 1e-8, 5e-1), encoder=(0.5,) * 3)).outcome == "holds"


def test_a_probe_that_diverged_before_any_look_fails():
    gone = Probe(GRADINIT, 1e-3, ("a",), (), (), (), "weights not finite", 1.0)
    assert judge(gone).outcome == "fails"
    assert "weights not finite" in judge(gone).reason
    assert table([gone]).splitlines()[1].split()[-1] == "fails"


def test_the_sentence_says_whether_training_will_hold():
    holds = "Training from GradInit without warmup at lr 0.001 will hold: 40% of the encoder's and "
    assert sentence(probe()).startswith(holds)
    unclear = "lr 0.001 may or may not hold: the source is hardly used yet (0.000 bits)."
    assert sentence(probe(bits=0.0)).endswith(unclear)


def test_the_table_is_in_the_order_of_the_rates():
    probes = [probe(lr=lr, arm=arm) for lr in (1e-3, 5e-4, 2e-3) for arm in ARMS]
    header, *rows = table(probes).split("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == [*["0.0005"] * 3, *["0.001"] * 3, *["0.002"] * 3]
    assert header.split() == ["lr", "start", "training", "loss", "encoder", "decoder", "source"]
    columns = ["0.0005", "GradInit", "holds", "12.00 to 9.00", "0.4", "0.3", "0.30"]
    assert [cell.strip() for cell in rows[0].split("  ") if cell] == columns
