"""The benchmark on handwritten digits runs, and compares like with like."""

from __future__ import annotations

from itertools import islice

import digits
import pytest
import torch
from conftest import ROOT
from record import RESULTS, markdown, read

KEPT = digits.kept(RESULTS / "digits.json")
SETTING = ("SGD", "residual", "default")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch, one seed, one epoch, one iteration."""
    for name in ("SEEDS", "EPOCHS", "ITERATIONS"):
        monkeypatch.setattr(digits, name, 1)
    for name in ("IMAGES", "CLASSES"):
        monkeypatch.setattr(digits, name, getattr(digits, name)[:96])
    monkeypatch.setattr(digits, "RATES", {"SGD": (0.03,), "Adam": (0.001,)})


@pytest.mark.slow
def test_a_tiny_measurement(tiny, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(digits, "RESULTS", tmp_path)
    digits.main([])
    printed = capsys.readouterr().out
    runs = digits.kept(tmp_path / "digits.json")
    # Without GradInit, with it, and longer without it; from the same weights.
    assert len(runs) == len(digits.SETTINGS) * 3
    assert len({run.weights for run in runs}) == 5
    assert sum(run.epochs > 1 for run in runs if not run.gradinit) == len(digits.SETTINGS)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    digits.main(["--table"])
    assert capsys.readouterr().out == printed


def test_the_page_shows_the_kept_runs() -> None:
    page = (ROOT / "docs" / "digits.md").read_text(encoding="utf-8")
    for table in digits.tables(KEPT):
        (shown,) = markdown(read(RESULTS / "digits.json"), [table]).split("\n\n")[-1:]
        assert f"## {table.title}\n" in page
        assert shown in page


def test_gradinit_changes_the_start_and_gives_the_same_bits_again(tiny) -> None:
    without, gradinit, again = (
        digits.run(SETTING, 0.02, 1, gradinit=on, epochs=1) for on in (False, True, True)
    )
    assert without.weights == gradinit.weights
    assert without.learning is None
    assert without.start_loss != gradinit.start_loss
    assert gradinit.learning["objective"] + gradinit.learning["constraint"] == 1
    assert gradinit.learning["min_scale"] < 1.0
    assert (again.curve, again.last_loss) == (gradinit.curve, gradinit.last_loss)


def test_an_epoch_shows_no_image_twice_and_no_test_image() -> None:
    epochs = [torch.cat([*islice(digits.batches(64, seed), 21)]).tolist() for seed in (1, 2)]
    assert epochs[0] != epochs[1]
    assert len(set(epochs[0])) == len(epochs[0]) == 21 * 64
    training = {image.numpy().tobytes() for image in digits.IMAGES}
    assert not any(image.numpy().tobytes() in training for image in digits.TEST_IMAGES)
