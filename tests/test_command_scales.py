"""`fairseq-gradinit diff` and `apply`: what they say of scales, and make of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GRADINIT, SCALES_ALONE, train_here

from fairseq_gradinit.cli import command
from fairseq_gradinit.plugin.safe_loading import allow_fairseq_checkpoints
from fairseq_gradinit.scales import file as scales
from fairseq_gradinit.scales.file import BlockScale, Scales

A = Scales(
    (
        BlockScale("fc.weight", (2, 2), 0.5, "learned"),
        BlockScale("fc.bias", (2,), 0.0, "learned"),
        BlockScale("norm.weight", (2,), 1.0, "norm gain"),
    ),
    {"gradinit": "0", "seed": "1", "eta": "0.001"},
)


def changed(*factors: float, settings: Mapping[str, str] = A.settings) -> Scales:
    blocks = zip(A.blocks, factors, strict=True)
    return Scales(tuple(replace(b, scale=f) for b, f in blocks), settings)


@pytest.fixture
def diff(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(a: Scales, b: Scales, *words: str) -> tuple[int, list[str]]:
        a.save(Path("a.json"))
        b.save(Path("b.json"))
        status = command.main(["diff", "a.json", "b.json", *words])
        return status, capsys.readouterr().out.splitlines()

    return run


# ---- diff


def test_equal_scales_do_not_differ(diff):
    assert diff(A, A) == (0, ["0 of 3 tensors differ"])


def test_differences_are_printed(diff):
    settings = {"gradinit": "0", "seed": "2", "gamma": "off"}
    assert diff(A, changed(0.75, 0.25, 1.0, settings=settings)) == (
        1,
        [
            "setting seed  1  2",
            "setting eta  0.001  -",
            "setting gamma  -  off",
            "fc.weight  0.5  0.75  ratio 1.5",
            "fc.bias  0  0.25",
            "2 of 3 tensors differ",
        ],
    )


def test_settings_alone_make_no_difference(diff):
    status, lines = diff(A, replace(A, settings={**A.settings, "seed": "2"}))
    assert (status, lines) == (0, ["setting seed  1  2", "0 of 3 tensors differ"])


def test_tensors_of_one_file_only_differ(diff):
    other = Scales((*A.blocks[:2], BlockScale("new", (), 3.0, "fixed")), A.settings)
    assert diff(A, other) == (
        1,
        ["norm.weight  1 (norm gain)  absent", "new  absent  3 (fixed)", "2 of 4 tensors differ"],
    )


def test_the_tolerance_is_relative(diff):
    other = changed(0.501, 0.0, 1.0)
    assert diff(A, other)[0] == 1
    assert diff(A, other, "--tolerance", "0.001")[0] == 1
    assert diff(A, other, "--tolerance", "0.0025")[0] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["absent", "a.json"], "cannot read absent"),
        (["a.json", "."], "there is no gradinit_scales.json in ."),
        (["a.json", "a.json", "--tolerance", "-1"], "--tolerance -1 is not a number from 0 up"),
        (["a.json", "a.json", "--tolerance", "nan"], "--tolerance nan is not a number from 0 up"),
    ],
)
def test_incomparable_arguments_end_with_2(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    A.save(Path("a.json"))
    assert command.main(["diff", *words]) == 2
    assert capsys.readouterr().err.startswith(f"fairseq-gradinit: {sentence}")


# ---- apply


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A checkpoint with the initial weights, and one with those that the scales were applied to."""
    folder = tmp_path_factory.mktemp("apply")
    still = ["--lr", "0", "--max-update", "1", "--save-interval-updates", "1"]
    tied = ["--share-all-embeddings"]
    assert train_here(corpus.translation, folder / "plain", *still, *tied).code == 0
    options = [*GRADINIT, *SCALES_ALONE, "--gradinit-eta", "1e-3"]
    assert train_here(corpus.translation, folder / "scaled", *still, *tied, *options).code == 0
    return folder


def load(path: Path) -> dict:
    allow_fairseq_checkpoints()
    return torch.load(path, weights_only=True)


def test_a_checkpoint_gets_the_weights_that_training_would_have(runs, tmp_path, capsys):
    out = tmp_path / "new.pt"
    checkpoint = runs / "plain" / "checkpoint_last.pt"
    assert command.main(["apply", str(runs / "scaled"), str(checkpoint), "--out", str(out)]) == 0
    before, after = load(checkpoint), load(out)
    expected = load(runs / "scaled" / "checkpoint_last.pt")["model"]
    assert after["model"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(after["model"][name], tensor), name
    embeddings = [name for name in expected if "embed_tokens" in name or "output_proj" in name]
    assert len(embeddings) == 3
    assert not torch.equal(before["model"][embeddings[0]], after["model"][embeddings[0]])
    count = len(Scales.load(runs / "scaled" / scales.SCALES_FILE).blocks) + 2
    assert capsys.readouterr().out == f"{out}: {count} tensors multiplied by their scales\n"
    assert after["cfg"] == before["cfg"]
    assert after["optimizer_history"] == before["optimizer_history"]


def test_weights_that_were_trained_are_told(runs, tmp_path, caplog):
    words = [runs / "scaled", runs / "plain" / "checkpoint_last.pt", "--out", tmp_path / "new.pt"]
    command.main(["apply", *map(str, words)])
    assert "has been trained for 1 updates: scales are learned for the weights" in caplog.text
    assert "centered" not in caplog.text


def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.rand(2, 2)
    return {
        "fc.weight": weight,
        "tied.weight": weight.clone(),
        "other.weight": torch.rand(2, 2),
        "fc.bias": torch.ones(2),
        "ones": torch.ones(2),
        "norm.weight": torch.ones(2),
        "step": torch.tensor(7),
    }


@pytest.fixture
def apply(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    A.save(Path("a.json"))

    def run(document: object, a: Scales = A) -> tuple[int, str]:
        a.save(Path("a.json"))
        torch.save(document, "old.pt")
        status = command.main(["apply", "a.json", "old.pt", "--out", "new.pt"])
        return status, capsys.readouterr().err

    return run


def test_a_bare_state_dict_will_do(apply):
    before = state_dict()
    assert apply(before) == (0, "")
    after = load(Path("new.pt"))
    assert torch.equal(after["fc.weight"], before["fc.weight"] * 0.5)
    assert torch.equal(after["tied.weight"], after["fc.weight"])
    assert torch.equal(after["fc.bias"], torch.zeros(2))
    # Equal to the bias, but constant: that may be by chance.
    for name in ("other.weight", "ones", "norm.weight", "step"):
        assert torch.equal(after[name], before[name])


def test_the_criterion_has_scales_too(apply):
    block = BlockScale("criterion.w", (2,), 3.0, "learned")
    document = {"model": state_dict(), "criterion": {"w": torch.ones(2)}}
    assert apply(document, Scales((*A.blocks, block), {})) == (0, "")
    assert torch.equal(load(Path("new.pt"))["criterion"]["w"], torch.full((2,), 3.0))


def test_centering_is_not_done_and_that_is_told(apply, caplog):
    blocks = (*A.blocks[:2], replace(A.blocks[2], state="centered"))
    assert apply(state_dict(), replace(A, blocks=blocks))[0] == 0
    assert "learned with centered LayerNorms" in caplog.text


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ([1], "old.pt is no checkpoint: it holds no dictionary"),
        ({"model": {}}, "old.pt is no checkpoint: there are no weights of a model in it"),
        ({"model": {"fc.weight": torch.ones(2, 2)}}, "the scales were learned for another model: "),
        ({**state_dict(), "fc.bias": torch.ones(1, 2)}, "the scales were learned for another mod"),
        ({"model": state_dict(), "extra_state": {"ema": {}}}, "old.pt has a moving average of "),
        ({"model": Path("x")}, "cannot read the checkpoint old.pt: "),
    ],
)
def test_documents_that_do_not_fit_are_refused(apply, document, sentence):
    status, error = apply(document)
    assert status == 1
    assert error.startswith(f"fairseq-gradinit: {sentence}")
    assert error.count("\n") == 1
    assert not Path("new.pt").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02text", b"text"])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    A.save(Path("a.json"))
    Path("old.pt").write_bytes(content)
    assert command.main(["apply", "a.json", "old.pt", "--out", "new.pt"]) == 1
    assert "cannot read the checkpoint old.pt" in capsys.readouterr().err


def test_a_checkpoint_is_not_overwritten(apply, tmp_path, capsys):
    apply(state_dict())
    before = Path("old.pt").read_bytes()
    assert command.main(["apply", "a.json", "old.pt", "--out", "./old.pt"]) == 1
    assert "choose another name for --out" in capsys.readouterr().err
    assert Path("old.pt").read_bytes() == before
