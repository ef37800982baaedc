"""Makes a parallel corpus ready for fairseq out of files that anybody can fetch.

`corpora` is the table of corpora. A corpus has origins (`origins`), by which files are fetched
(`downloads`, `packages`; `checksums`, `programs`) and pairs read out of them (`catalogues`,
`texts`, `help_pages`); a cleaning (`normalising`, `filters`, `cleaning`); and a split
(`splitting`). `pipeline` makes a corpus in resumable steps (`steps`): `text_step`; `subwords_step`,
with `moses`, `bpe` and `sentencepiece_model`; and `binary_step`. `parallel` uses all cores.
"""

from typing import NamedTuple


class DataPrepError(Exception):
    """An error that the user can fix; its text is one or two sentences that say how."""


class Pair(NamedTuple):
    """One text in both languages; `first` and `second` follow the corpus's languages."""

    first: str
    second: str
