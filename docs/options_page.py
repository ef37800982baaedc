"""The site's reference of options, from the code that puts them on the command line."""

from __future__ import annotations

import re
from dataclasses import Field, fields
from enum import Enum
from types import NoneType
from typing import Any, get_args

from fairseq_gradinit.plugin.options import PRESETS, GradInitOptions
from fairseq_gradinit.plugin.schemes.options import SchemeOptions

_HELP = re.compile(
    r"(?P<text>.+?)(?: \(default: (?P<default>.+?)(?:; preset paper: (?P<paper>.+))?\))?"
)
_KINDS = {bool: "a switch", int: "a whole number", float: "a number", str: "text"}

_PAGE = """\
# Options

Made from the code. Each is an option of `fairseq-train --user-dir fairseq_gradinit`, with every
task. `fairseq-hydra-train` takes it under its Hydra name, a switch as `task.gradinit=true`. In YAML
`gradinit_centering: off`, which is a boolean there, and `gradinit_betas: [0.9, 0.98]` work too.
"Default" is what holds without the option, and "preset `paper`" what holds without it after
`--gradinit-preset paper`.

## GradInit

{gradinit}
## Other initialisations

What they are, and what each came to: [rivals](rivals.md).

{schemes}"""


def options_page() -> str:
    """The page, in Markdown: a heading for each option, and under it all there is to know."""
    # The first field is fairseq's `_name`.
    gradinit, schemes = (
        "\n".join(map(_section, fields(kind)[1:])) for kind in (GradInitOptions, SchemeOptions)
    )
    return _PAGE.format(gradinit=gradinit, schemes=schemes)


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
