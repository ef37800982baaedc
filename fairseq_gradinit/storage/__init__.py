"""Small JSON files, written whole or not at all and checked field by field when read.

`save_document` and `load_document` keep a dataclass, `append_line` and `read_lines` JSON lines that
several processes may append to; `parse` makes a dataclass of what JSON holds.
"""

from fairseq_gradinit.storage.files import (
    Format,
    load_document,
    save_document,
    write_atomically,
)
from fairseq_gradinit.storage.json_lines import append_line, read_lines
from fairseq_gradinit.storage.typed_json import abbreviate, parse

__all__ = [
    "Format",
    "abbreviate",
    "append_line",
    "load_document",
    "parse",
    "read_lines",
    "save_document",
    "write_atomically",
]
