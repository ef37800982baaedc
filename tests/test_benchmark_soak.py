"""What the soak programs make of their observations."""

from __future__ import annotations

import pytest
import soak
import soak_chain


def samples(slope: float, bump: int = 0) -> list[soak.Sample]:
    """100 seconds of 20 steps each, with so many KiB more a step, after a start that fills up."""
    return [
        soak.Sample(
            i, 20 * i, round(slope * 20 * i) + (1000 if i > 20 else 40 * i) + bump * (i % 2), 7
        )
        for i in range(101)
    ]


@pytest.mark.parametrize("slope", [0.0, 1.5, -0.5])
def test_the_slope_is_that_after_the_start(slope):
    found = soak.growth(samples(slope))
    assert found["kib_per_1000_steps"] == pytest.approx(1000 * slope, abs=1)
    assert found["standard_error"] < 15
    assert found["files_first_half"] == found["files_second_half"] == 7


def test_memory_that_goes_up_and_down_has_no_slope():
    found = soak.growth(samples(0.0, bump=300))
    assert abs(found["kib_per_1000_steps"]) < 2 * found["standard_error"] + 1


@pytest.mark.parametrize(
    ("printed", "step"),
    [
        ("", "start"),
        ("python3 /a/data-prep/prepare.py numbers --out /b\nstep text: started", "preparation"),
        ("python3 /a/prepare.py numbers\n\n== multi30k/gradinit-adam, seed 1", "before training"),
        ("== m, seed 1\nfairseq-train /d --x >> /r/train.log", "training, from a checkpoint"),
        ("train: done before\npython3 /a/average_checkpoints.py /c --last 2", "averaging"),
        ("fairseq-generate /d --path /r/average.pt >> /r/t.log", "translation"),
        ("translate-test: done before\nbash /a/score.sh /r", "scoring"),
    ],
)
def test_a_kill_fell_into_what_was_printed_last(tmp_path, printed, step):
    checkpoints = tmp_path / "smoke/multi30k/gradinit-adam/lr/seed-1/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "checkpoint_last.pt").touch()
    (tmp_path / "output").write_text(printed)
    assert soak_chain.step_of(tmp_path) == step
