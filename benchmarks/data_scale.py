"""Time and memory of preparing WMT'14 English-German, on a text of its kind and size.

    python benchmarks/data_scale.py --pairs 1000000 --text DIR --text DIR
    python benchmarks/data_scale.py --table

The archives of WMT'14 are made at any size out of the training text of corpora that are there
(--text: folders of data-prep/prepare.py, German-English), and prepared by `data-prep/prepare.py
wmt14-en-de` as it stands, but for the archives' checksums. Pairs are joined until they are on
average as long as WMT'14's, and some of their words are joined to new ones, so that the vocabulary
grows with the text as it does there. Memory is what all processes of the preparation hold together
(proportional set size, from /proc), sampled twice a second.
"""

from __future__ import annotations

import argparse
import io
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from record import RESULTS, Table, markdown, read, write

RESULT = RESULTS / "data-scale.json"

# As counted for wmt/wmt14, "de-en", on huggingface.co/datasets: bytes of the text, and pairs.
WMT_CHARACTERS = 1_358_406_800 / 4_508_785

NEW_WORDS = 0.015
"""The share of words that are joined to the next one, and so make a new one."""

SHARES = {
    "training-parallel-europarl-v7.tgz": ("training/europarl-v7.de-en.{}", 0.43),
    "training-parallel-commoncrawl.tgz": ("commoncrawl.de-en.{}", 0.53),
    "training-parallel-nc-v9.tgz": ("training/news-commentary-v9.de-en.{}", 0.04),
}
DEV_PAIRS, TEST_PAIRS = 3000, 3003


@dataclass(frozen=True)
class Outcome:
    """Of one preparation.

    Attributes:
        text_bytes: of the training text, both sides.
        types: different words of the training text, German and English.
        steps: the seconds of each.
        peak_bytes: memory of all processes together.
        disk_bytes: what the folder takes afterwards, archives included.
    """

    pairs: int
    text_bytes: int
    types: tuple[int, int]
    workers: int
    seconds: float
    steps: dict[str, float]
    peak_bytes: int
    disk_bytes: int


# ---- The text.


def pairs_like_wmt(folders: Sequence[Path], seed: int = 1) -> Iterator[tuple[str, str]]:
    """German and English sentences of WMT'14's length, without end."""
    pool = [
        pair
        for folder in folders
        for pair in zip(
            *(_lines(folder / "text" / f"train.{c}") for c in ("de", "en")), strict=True
        )
    ]
    usual = sum(len(text) for pair in pool for text in pair) / len(pool)
    choice = random.Random(seed)
    while True:
        joined = list(choice.choice(pool))
        while choice.random() > usual / WMT_CHARACTERS:
            joined = [" ".join(texts) for texts in zip(joined, choice.choice(pool), strict=True)]
        yield _with_new_words(joined[0], choice), _with_new_words(joined[1], choice)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def _with_new_words(text: str, choice: random.Random) -> str:
    return re.sub(r"(?<=\w) (?=\w)", lambda _: "" if choice.random() < NEW_WORDS else " ", text)


def write_archives(folder: Path, pairs: Iterator[tuple[str, str]], number: int) -> None:
    """All files of WMT'14, with `number` pairs for training."""
    for archive, (name, share) in SHARES.items():
        part = list(islice(pairs, round(number * share)))
        sides = [[pair[side] for pair in part] for side in (0, 1)]
        _write_tgz(
            folder / archive, {name.format(c): s for c, s in zip(("de", "en"), sides, strict=True)}
        )
    dev, test = (list(islice(pairs, count)) for count in (DEV_PAIRS, TEST_PAIRS))
    _write_tgz(
        folder / "dev.tgz",
        {f"dev/newstest2013.{c}": [pair[i] for pair in dev] for i, c in enumerate(("de", "en"))},
    )
    _write_tgz(
        folder / "test-full.tgz",
        {
            f"test-full/newstest2014-deen-{kind}.{code}.sgm": [
                f'<seg id="{number}">{pair[side]}</seg>' for number, pair in enumerate(test, 1)
            ]
            for side, (kind, code) in enumerate((("ref", "de"), ("src", "en")))
        },
    )


def _write_tgz(path: Path, texts: dict[str, list[str]]) -> None:
    with tarfile.open(path, "w:gz", compresslevel=6) as archive:
        for name, lines in texts.items():
            content = "".join(f"{line}\n" for line in lines).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


# ---- The measurement.


def measure(archives: Path, out: Path, number: int, workers: int, merges: int | None) -> Outcome:
    """Prepare the corpus in a process of its own."""
    program = Path(__file__).with_name("data_scale_prepare.py")
    command = [sys.executable, str(program), str(archives), str(number)]
    command += ["--out", str(out), "--workers", str(workers)]
    command += ["--vocab-size", str(merges)] if merges else []
    start = time.monotonic()
    log: list[str] = []
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        memory = Memory(process.pid)
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            log.append(line)
        peak = memory.stop()
    if process.returncode != 0:
        raise SystemExit(f"the preparation failed: {log[-1]}")
    found = re.findall(r"step (\S+): done in (\d+) s", "".join(log))
    sides = [out / "text" / f"train.{code}" for code in ("de", "en")]
    return Outcome(
        pairs=number,
        text_bytes=sum(side.stat().st_size for side in sides),
        types=(_types(sides[0]), _types(sides[1])),
        workers=workers,
        seconds=time.monotonic() - start,
        steps={name: float(seconds) for name, seconds in found},
        peak_bytes=peak,
        disk_bytes=sum(p.stat().st_size for p in (*out.rglob("*"), *archives.iterdir())),
    )


def _types(path: Path) -> int:
    words: set[str] = set()
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            words.update(line.split())
    return len(words)


class Memory:
    """Watches the processes of a session, whose number is that of its first process."""

    def __init__(self, session: int) -> None:
        self._session = session
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        """End watching; returns the largest number of bytes that was seen."""
        self._ended.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            self._peak = max(self._peak, sum(map(_memory, self._processes())))

    def _processes(self) -> Iterator[Path]:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if int(fields[3]) == self._session:
                yield folder


def _memory(process: Path) -> int:
    """Proportional set size in bytes: what processes share is counted once."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", (process / "smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


# ---- The program.


def table(outcomes: Sequence[Outcome]) -> Table:
    """What was measured."""
    rows = [
        [
            f"{r.pairs:,}",
            f"{r.text_bytes / 1e6:,.0f}",
            f"{r.types[0]:,}, {r.types[1]:,}",
            str(r.workers),
            *(f"{r.steps[name]:.0f}" for name in ("text", "tokens", "subwords", "data-bin")),
            f"{r.peak_bytes / 1e9:.2f}",
            f"{r.disk_bytes / 1e9:.2f}",
        ]
        for r in outcomes
    ]
    header = ["pairs", "text, MB", "types, de and en", "workers"]
    header += [f"{name}, s" for name in ("text", "tokens", "subwords", "data-bin")]
    header += ["peak memory, GB", "disk, GB"]
    return Table("Preparing a text of WMT'14's kind", header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--merges", type=int, help="of BPE, instead of the corpus's own")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for archives and outcome")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if not options.table:
        if not options.text:
            parser.error("--text is needed: a folder of data-prep/prepare.py")
        outcomes = list(run(options))
        results = {"outcomes": list(map(asdict, outcomes)), "tables": [asdict(table(outcomes))]}
        write(options.output, results)
    print(markdown(read(options.output)), end="")
    return 0


def run(options: argparse.Namespace) -> Iterator[Outcome]:
    """Measure all sizes."""
    for number in options.pairs:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            archives = Path(folder) / "archives"
            archives.mkdir()
            write_archives(archives, pairs_like_wmt(options.text), number)
            yield measure(archives, Path(folder) / "out", number, options.workers, options.merges)


if __name__ == "__main__":
    sys.exit(main())
