"""The benchmark on what a short warmup changes trains each start, and shows what was seen."""

import pytest
import transplant
from conftest import SMALL_MODEL


@pytest.mark.slow
def test_each_start_is_trained_once(corpus, tmp_path, monkeypatch, capsys):
    file = tmp_path / "transplant.jsonl"
    training = [str(corpus.translation), "--task", "translation", *SMALL_MODEL, "--cpu"]
    training += ["--optimizer", "adam", "--lr", "4e-3", "--max-tokens", "200", "--max-update", "9"]
    training += ["--gradinit-iterations", "2", "--criterion", "label_smoothed_cross_entropy"]
    command = ["--results", str(file), "--updates", "5", "--", "fairseq-train", *training]
    monkeypatch.setattr(transplant, "KEPT_AT", 3)
    transplant.main(command)
    printed = capsys.readouterr().out
    names = [f"warmup over {transplant.WARMUP} updates", "no warmup", *transplant.STARTS]
    assert [line.split(" | ")[0][2:] for line in printed.splitlines()[2:]] == names
    looks = transplant.looks_in(file)
    assert all([look["update"] for look in seen] == [0, 5] for seen in looks.values())
    firsts = {name: seen[0]["loss"] for name, seen in looks.items()}
    assert firsts["no warmup"] == firsts[names[0]]
    assert firsts["all weights"] != firsts["no warmup"] != firsts["embeddings"]
    before = file.read_text()
    transplant.main(command)
    assert file.read_text() == before
