"""What the README says about options is what the code does."""

from __future__ import annotations

import re

import torch
from conftest import ROOT

from fairseq_gradinit.plugin.options import OPTION_NAMES, PRESETS, GradInitOptions

README = (ROOT / "README.md").read_text()


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    return {"False": "off", "None": ""}.get(str(value), str(value))


def test_defaults_of_the_six_options_are_those_of_the_presets():
    default, paper = PRESETS["default"], PRESETS["paper"]
    rows = re.findall(r"^\| `--(gradinit\S*)` \|(.*?)\|(.*?)\|", README, re.MULTILINE)
    assert len(rows) == 6
    for flag, *cells in rows:
        option = flag.replace("-", "_")
        assert option in OPTION_NAMES
        name, cells = option.removeprefix("gradinit_"), [cell.strip() for cell in cells]
        if name == "max_tokens":
            growth = f"{default.batch_per_training_batch:g} times `--max-tokens`"
            assert cells == [growth, shown(paper.max_tokens)]
        elif hasattr(default, name):
            assert cells == [shown(getattr(default, name)), shown(getattr(paper, name))], flag
        else:
            assert cells[0] == shown(getattr(GradInitOptions, option)), flag


def test_the_example_runs_and_lowers_the_trial_loss():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
