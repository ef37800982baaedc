"""The benchmark on what a short warmup changes trains each start, and shows what was seen."""

import pytest
import transplant
from conftest import SMALL_MODEL


@pytest.mark.slow
def test_each_start_is_trained(corpus, tmp_path, monkeypatch, capsys):
    file = tmp_path / "transplant.jsonl"
    training = [str(corpus.translation), "--task", "translation", *SMALL_MODEL, "--cpu"]
    training += ["--optimizer", "adam", "--lr", "4e-3", "--max-tokens", "200", "--max-update", "9"]
    training += ["--gradinit-iterations", "2", "--criterion", "label_smoothed_cross_entropy"]
    monkeypatch.setattr(transplant, "KEPT_AT", 3)
    monkeypatch.setattr(transplant, "UPDATES", 5)
    transplant.main(["--results", str(file), "--", "fairseq-train", *training])
    names = [f"warmup over {transplant.WARMUP} updates", *transplant.STARTS]
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == names
    looks = transplant.looks_in(file)
    assert all([look["update"] for look in seen] == [0, 5] for seen in looks.values())
    firsts = {name: seen[0]["loss"] for name, seen in looks.items()}
    assert firsts["no warmup"] == firsts[names[0]]
    assert firsts["all weights"] != firsts["no warmup"] != firsts["embeddings"]
