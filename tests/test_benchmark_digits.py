"""The benchmark on handwritten digits runs, and compares like with like."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import digits
import pytest
import torch
from conftest import ROOT
from digits import Effort, Run
from record import RESULTS, markdown, read

TINY = Effort(
    seeds=1, epochs=1, iterations=1, rates={"SGD": (0.03,), "Adam": (0.001,)}, train_images=96
)


def case(**changes) -> Run:
    usual = Run("SGD", "residual", "default", 0.02, 1, gradinit=False, epochs=1)
    return replace(usual, **changes)


@pytest.mark.slow
def test_a_tiny_measurement(tmp_path, capsys, monkeypatch) -> None:
    nets = {name: make for name, make in digits.NETS.items() if name != "plain"}
    monkeypatch.setattr(digits, "NETS", nets)
    digits.main(["--results", str(tmp_path), "--seeds", "1"], TINY)
    printed = capsys.readouterr().out
    runs = digits.kept(tmp_path / "digits.json")
    # Two nets, one of them from two initialisations, with two optimizers.
    assert len(runs) == 2 * (2 + 1) * 3
    # Runs of a seed start from the same weights, and train for as long.
    assert len({run.weights for run in runs}) == 3
    for net, start in {(run.net, run.start) for run in runs}:
        here = [run for run in runs if (run.net, run.start) == (net, start)]
        assert len({run.start_loss for run in here if not run.gradinit}) == 1
    assert {run.epochs for run in runs if run.gradinit} == {TINY.epochs}
    # Except those that get GradInit's time for training.
    assert sum(run.epochs > TINY.epochs for run in runs) == len(digits.settings())
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    digits.main(["--table", "--results", str(tmp_path)])
    assert capsys.readouterr().out == printed


def test_the_page_shows_the_kept_runs() -> None:
    page = (ROOT / "docs" / "digits.md").read_text(encoding="utf-8")
    for table in digits.tables(digits.comparisons(digits.kept(RESULTS / "digits.json"))):
        (shown,) = markdown(read(RESULTS / "digits.json"), [table]).split("\n\n")[-1:]
        assert f"## {table.title}\n" in page
        assert shown in page


def test_gradinit_changes_the_start_and_says_what_it_took() -> None:
    without, gradinit = (digits.run(case(gradinit=on), TINY) for on in (False, True))
    assert without.weights == gradinit.weights
    assert without.learning is None
    assert without.start_loss != gradinit.start_loss
    assert gradinit.learning["objective"] + gradinit.learning["constraint"] == 1
    assert gradinit.learning["min_scale"] < 1.0
    assert gradinit.learning["updates"] > 0.0
    again = digits.run(case(gradinit=True), TINY)
    assert (again.curve, again.last_loss) == (gradinit.curve, gradinit.last_loss)


def test_seeds_differ_and_an_epoch_shows_no_image_twice() -> None:
    nets = {digits.digest(digits.new_net("residual", "default", seed)) for seed in (1, 2)}
    epochs = [torch.cat([*islice(digits.batches(100, 32, seed), 3)]).tolist() for seed in (1, 2)]
    assert len(nets) == 2
    assert epochs[0] != epochs[1]
    assert len(set(epochs[0])) == len(epochs[0]) == 96


def test_training_and_test_images_are_disjoint_and_have_all_classes_alike() -> None:
    data = digits.digits()
    assert (len(data.images), len(data.test_images)) == (1347, 450)
    training = {image.numpy().tobytes() for image in data.images}
    assert not any(image.numpy().tobytes() in training for image in data.test_images)
    assert 43 <= data.test_classes.bincount().min() <= data.test_classes.bincount().max() <= 47


def test_a_run_that_diverges_is_told_so() -> None:
    side = [digits.run(case(rate=1e9), TINY)]
    assert digits.outcome(side)[0] == "1 of 1 diverge"


def test_the_best_learning_rate_is_the_one_with_the_lowest_training_loss() -> None:
    sides = [
        [case(rate=0.1, accuracy=0.9)],
        [case(rate=0.2, last_loss=0.5), case(rate=0.2, last_loss=0.7)],
        [case(rate=0.3, last_loss=last, accuracy=0.9) for last in (0.1, 2.0)],
    ]
    assert digits.best(sides)[0].rate == 0.2
