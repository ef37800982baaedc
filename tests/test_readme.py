"""What the README says about options is what the code does."""

from __future__ import annotations

import re

import torch
from conftest import ROOT

from fairseq_gradinit.plugin.options import OPTION_NAMES, PRESETS, GradInitOptions


def rows() -> dict[str, tuple[str, str]]:
    """Flag to (default, default of preset paper), from the README's table of options."""
    found = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("| `--gradinit"):
            flag, default, paper, _ = (cell.strip() for cell in line.strip("|").split("|"))
            found[flag.strip("`")] = (default, paper)
    return found


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def test_the_table_has_six_options():
    assert len(rows()) == 6
    assert set(rows()) <= {"--" + name.replace("_", "-") for name in OPTION_NAMES}


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 1000


def test_defaults_are_those_of_the_presets():
    default, paper = PRESETS["default"], PRESETS["paper"]
    for flag, cells in rows().items():
        name = flag.removeprefix("--gradinit").lstrip("-").replace("-", "_")
        if name == "max_tokens":
            growth = f"{default.batch_per_training_batch:g} times `--max-tokens`"
            assert cells == (growth, shown(paper.max_tokens))
        elif hasattr(default, name):
            assert cells == (shown(getattr(default, name)), shown(getattr(paper, name))), flag
        else:
            value = getattr(GradInitOptions, flag.lstrip("-").replace("-", "_"))
            assert cells[0] == {"False": "off", "None": ""}.get(str(value), shown(value)), flag


def test_the_example_runs_and_lowers_the_trial_loss():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(code, names)
    trial = [iteration.trial_loss for iteration in names["result"].history]
    assert sum(trial[-10:]) < 0.9 * sum(trial[:10])
    for name, parameter in names["net"].named_parameters():
        # torch draws them from [-1/4, 1/4].
        assert parameter.abs().max() <= names["result"].scales[name] / 4 + 1e-6
        assert names["result"].scales[name] != 1.0, name
