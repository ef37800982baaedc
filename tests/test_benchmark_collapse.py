"""The benchmark on rank collapse runs, and its table shows what its runs saw."""

import collapse
import pytest
from record import read

TINY = [
    *("--encoder-layers", "2", "--decoder-layers", "2", "--max-tokens", "200"),
    *("--encoder-embed-dim", "32", "--decoder-embed-dim", "32"),
    *("--encoder-ffn-embed-dim", "64", "--decoder-ffn-embed-dim", "64"),
]


@pytest.mark.slow
def test_a_tiny_measurement(corpus, tmp_path, capsys, monkeypatch) -> None:
    for name, value in (("RESULTS", tmp_path), ("UPDATES", 2), ("PROBED", (0, 1, 2))):
        monkeypatch.setattr(collapse, name, value)
    monkeypatch.setattr(collapse, "TRAINING", [*collapse.TRAINING, *TINY])
    collapse.main([str(corpus.translation)])
    runs = read(tmp_path / "collapse.json")["results"]["runs"]
    assert (tmp_path / "collapse.png").stat().st_size > 10_000
    assert [run["arm"] for run in runs] == list(collapse.ARMS)
    for run in runs:
        assert [probe["update"] for probe in run["probes"]] == [0, 1, 2]
        for probe in run["probes"]:
            assert len(probe["encoder"]) == len(probe["decoder"]) == 2
            assert all(0.0 < share < 1.0 for share in probe["encoder"] + probe["decoder"])
            assert abs(probe["source_bits"]) < 1
    default, warm, scales, gradinit = (run["probes"][0] for run in runs)
    assert default == warm != scales != gradinit
    loss = f"{runs[0]['probes'][-1]['loss']:.2f}"
    rows = capsys.readouterr().out.splitlines()
    assert any(
        row.startswith("| default, no warmup | val") and row.endswith(loss + " |") for row in rows
    )
