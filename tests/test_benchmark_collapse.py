"""The benchmark on rank collapse runs, and its table shows what its runs saw."""

from __future__ import annotations

from dataclasses import replace

import collapse
import pytest
from collapse import FULL, Effort
from record import read

TINY = Effort(
    updates=2,
    options=(
        *("--encoder-layers", "2", "--decoder-layers", "2"),
        *("--encoder-embed-dim", "32", "--decoder-embed-dim", "32", "--max-tokens", "200"),
        *("--encoder-ffn-embed-dim", "64", "--decoder-ffn-embed-dim", "64"),
    ),
    gradinit=("--gradinit-iterations", "2"),
)


@pytest.mark.slow
def test_a_tiny_measurement(corpus, tmp_path, capsys) -> None:
    arguments = [str(corpus.translation), "--lr", "0.002"]
    collapse.main([*arguments, "--results", str(tmp_path)], TINY)
    runs = read(tmp_path / "collapse-2e-3.json")["results"]["runs"]
    assert (tmp_path / "collapse-2e-3.png").stat().st_size > 10_000
    arms = collapse.arms_for(TINY)
    assert [run["arm"] for run in runs] == [arm.name for arm in arms]
    for run in runs:
        assert [probe["update"] for probe in run["probes"]] == [0, 1, 2]
        for probe in run["probes"]:
            assert len(probe["encoder"]) == len(probe["decoder"]) == 2
            assert all(0.0 < share < 1.0 for share in probe["encoder"] + probe["decoder"])
            assert abs(probe["source_bits"]) < 1
    default, warm, scales, gradinit = (run["probes"][0] for run in runs)
    assert default == warm != scales != gradinit
    printed = capsys.readouterr().out
    (row,) = (line for line in printed.splitlines() if "default, no warmup | validation" in line)
    assert row.endswith(f"| {runs[0]['probes'][-1]['loss']:.2f} |")


def test_warmup_takes_a_quarter_of_the_updates() -> None:
    _, warmup, *_ = collapse.arms_for(replace(FULL, updates=400))
    assert warmup.options == ("--warmup-updates", "100")


@pytest.mark.parametrize(
    ("rate", "name"),
    [(1e-3, "collapse"), (5e-4, "collapse-5e-4"), (1.5e-3, "collapse-1.5e-3")],
)
def test_the_rate_names_the_files(rate: float, name: str) -> None:
    assert collapse.name_for(rate) == name
