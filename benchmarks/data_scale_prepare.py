"""What benchmarks/data_scale.py measures: the preparation of WMT'14, of archives made for it.

A program of its own, so that its processes load nothing but what every preparation loads.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "data-prep"))

import prepare
from dataprep.checksums import file_sha256
from dataprep.corpora import CORPORA, WMT14_EN_DE


def enter(archives: Path, pairs: int) -> None:
    """Have the table expect these archives, with this many pairs for training."""
    files = tuple(
        replace(file, digest=f"sha256:{file_sha256(archives / file.filename)}", size=None)
        for file in WMT14_EN_DE.origin.files
    )
    CORPORA[WMT14_EN_DE.name] = replace(
        WMT14_EN_DE,
        origin=replace(WMT14_EN_DE.origin, files=files),
        with_text={**WMT14_EN_DE.with_text, "train": pairs},
    )


if __name__ == "__main__":
    archives, pairs, *arguments = sys.argv[1:]
    enter(Path(archives), int(pairs))
    sys.exit(prepare.main([WMT14_EN_DE.name, "--mirror", archives, *arguments]))
