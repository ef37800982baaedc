"""The benchmark on handwritten digits runs, and compares like with like."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import digits
import pytest
import torch
from digits import QUICK, Arm, Case, Outcome, Setting
from record import read

RESIDUAL = Setting("residual", "default", "sgd")


def case(**changes) -> Case:
    usual = Case(RESIDUAL, 0.02, 1, gradinit=False, epochs=1, iterations=1, train_images=128)
    return replace(usual, **changes)


def outcome(rate: float, last_loss: float | None, accuracy: float = 0.1) -> Outcome:
    return Outcome(case(rate=rate), "", [], 2.3, last_loss, last_loss, accuracy, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def record(folder):
    digits.main(["--quick", "--results", str(folder)])
    return read(folder / "digits.json")


def test_a_quick_run_writes_tables_and_picture(record, folder) -> None:
    best, cost, rates = record["results"]["tables"]
    # Three nets, two of them from two initialisations, with two optimizers.
    assert len(best["rows"]) == len(cost["rows"]) == 2 * (3 + 2)
    assert len(rates["rows"]) == 5 * (len(QUICK.rates["sgd"]) + len(QUICK.rates["adam"]))
    for table in (best, cost, rates):
        assert all(len(row) == len(table["header"]) for row in table["rows"])
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_arms_of_a_seed_start_from_the_same_weights(record) -> None:
    runs = record["results"]["runs"]
    for net in digits.NETS:
        for start in digits.starts(net):
            arms = [run for run in runs if (run["net"], run["start"]) == (net, start)]
            assert len({run["weights"] for run in arms}) == 1
            assert len({run["start_loss"] for run in arms if not run["gradinit"]}) == 1
    assert len({run["weights"] for run in runs}) == 5


def test_arms_train_for_the_same_number_of_updates(record) -> None:
    rows = [run for run in record["results"]["runs"] if run["last_loss"] is not None]
    with_gradinit = {run["epochs"] for run in rows if run["gradinit"]}
    assert with_gradinit == {QUICK.epochs}
    # The only others are those that get GradInit's time for training.
    assert {run["epochs"] for run in rows if not run["gradinit"]} > with_gradinit


def test_gradinit_changes_the_weights_and_says_what_it_took(record) -> None:
    for run in record["results"]["runs"]:
        learning = run["gradinit"]
        if learning:
            assert learning["objective"] + learning["constraint"] == QUICK.iterations
            assert learning["min_scale"] < 1.0
            assert learning["updates"] > 0.0


@pytest.mark.parametrize("gradinit", [False, True])
def test_a_run_can_be_repeated(gradinit: bool) -> None:
    first, second = (digits.run(case(gradinit=gradinit)) for _ in range(2))
    assert first.curve == second.curve
    assert first.last_loss == second.last_loss
    assert first.accuracy == second.accuracy


def test_seeds_differ_in_weights_and_in_the_order_of_images() -> None:
    nets = [digits.digest(digits.new_net(RESIDUAL, seed)) for seed in (1, 2)]
    assert nets[0] != nets[1]
    orders = [next(digits.batches(100, 50, seed)).tolist() for seed in (1, 2)]
    assert orders[0] != orders[1]


def test_an_epoch_shows_no_image_twice() -> None:
    epoch = torch.cat([*islice(digits.batches(100, 32, seed=1), 3)])
    assert len(set(epoch.tolist())) == len(epoch) == 96


def test_training_and_test_images_are_disjoint_and_have_all_classes_alike() -> None:
    data = digits.digits()
    assert (len(data.images), len(data.test_images)) == (1347, 450)
    training = {image.numpy().tobytes() for image in data.images}
    assert not any(image.numpy().tobytes() in training for image in data.test_images)
    assert 43 <= data.test_classes.bincount().min() <= data.test_classes.bincount().max() <= 47


def test_measuring_leaves_the_running_statistics_alone() -> None:
    net = digits.new_net(Setting("residual, BatchNorm", "default", "sgd"), seed=1)
    before = [buffer.clone() for buffer in net.buffers()]
    digits.training_loss(net, digits.digits(128))
    assert all(torch.equal(was, now) for was, now in zip(before, net.buffers(), strict=True))


def test_a_run_that_diverges_is_told_so() -> None:
    arm = Arm([digits.run(case(rate=1e9))])
    assert arm.first_epoch == "1 of 1 diverge"
    assert arm.mean_last_loss == float("inf")


def test_the_best_learning_rate_is_the_one_with_the_lowest_training_loss() -> None:
    arms = [
        Arm([outcome(0.1, None, accuracy=0.9)]),
        Arm([outcome(0.2, 0.5), outcome(0.2, 0.7)]),
        Arm([outcome(0.3, 0.1, accuracy=0.9), outcome(0.3, 2.0, accuracy=0.9)]),
    ]
    assert digits.best(arms).rate == 0.2
