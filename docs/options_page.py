"""The site's reference of options, from the code that puts them on the command line."""

from __future__ import annotations

import re
from dataclasses import Field, fields
from enum import Enum
from types import NoneType
from typing import Any, get_args

from fairseq.dataclass import FairseqDataclass

from fairseq_gradinit.plugin.options import PRESETS, GradInitOptions
from fairseq_gradinit.plugin.schemes.options import SchemeOptions

_HELP = re.compile(
    r"(?P<text>.+?)(?: \(default: (?P<default>.+?)(?:; preset paper: (?P<paper>.+))?\))?"
)
_KINDS = {bool: "a switch", int: "a whole number", float: "a number", str: "text"}

_INTRODUCTION = """\
# Options

Made from the code. Each is an option of `fairseq-train --user-dir fairseq_gradinit`, with every
task. `fairseq-hydra-train` takes it under its Hydra name, a switch as `task.gradinit=true`. In YAML
`gradinit_centering: off`, which is a boolean there, and `gradinit_betas: [0.9, 0.98]` work too.
"Default" is what holds without the option, and "preset `paper`" what holds without it after
`--gradinit-preset paper`.
"""


def options_page() -> str:
    """The page, in Markdown: a heading for each option, and under it all there is to know."""
    return "\n".join(
        (
            _INTRODUCTION,
            "## GradInit\n",
            *_sections(GradInitOptions),
            "## Other initialisations\n",
            "What they are, and what each came to: [rivals](rivals.md).\n",
            *_sections(SchemeOptions),
        )
    )


def _sections(options: type[FairseqDataclass]) -> list[str]:
    return [_section(option) for option in fields(options) if option.name != "_name"]


def _section(option: Field[Any]) -> str:
    found = _HELP.fullmatch(option.metadata["help"])
    assert found is not None
    flag = "--" + option.name.replace("_", "-")
    rows = [
        f"- Hydra name: `task.{option.name}`",
        f"- value: {_value(option.type)}",
        f"- default: {found['default'] or ('off' if option.default is False else 'none')}",
    ]
    if hasattr(PRESETS["paper"], option.name.removeprefix("gradinit_")):
        rows.append(f"- preset `paper`: {found['paper'] or found['default']}")
    return "\n".join((f"### {flag}\n", f"{found['text']}\n", *rows, ""))


def _value(annotation: Any) -> str:
    (kind,) = [kind for kind in get_args(annotation) if kind is not NoneType] or [annotation]
    if issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    return _KINDS[kind]
