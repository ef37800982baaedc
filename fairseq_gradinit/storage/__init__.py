"""Small JSON files, written whole or not at all and read with distrust.

`save_document` and `load_document` keep a dataclass with the format and version of its file.
`write_atomically` replaces a file; `append_line` and `read_lines` keep a file of JSON lines that
several processes may append to. `parse` makes a dataclass of what JSON holds, and
`require_printable` checks a text.
"""

from fairseq_gradinit.storage.documents import Format, load_document, save_document
from fairseq_gradinit.storage.files import (
    abbreviate,
    require_printable,
    write_atomically,
)
from fairseq_gradinit.storage.json_lines import append_line, read_lines
from fairseq_gradinit.storage.typed_json import parse

__all__ = [
    "Format",
    "abbreviate",
    "append_line",
    "load_document",
    "parse",
    "read_lines",
    "require_printable",
    "save_document",
    "write_atomically",
]
