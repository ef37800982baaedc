"""How many lines data-prep tokenises and joins again exactly as the Perl scripts of Moses do.

    python benchmarks/moses_agreement.py --moses mosesdecoder --text NAME LANGUAGE FILE [--text ...]

`--moses` is a clone of https://github.com/moses-smt/mosesdecoder; perl has to be installed. Writes
moses-agreement.json; `--table` prints the tables of the last run instead. A line agrees if its
tokens are the same: the scripts leave some spaces doubled or at the end, which data-prep does not.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path

import torch
from record import REPOSITORY, RESULTS, Table, markdown, read, write
from sacremoses import MosesPunctNormalizer, MosesTokenizer

sys.path.append(str(REPOSITORY / "data-prep"))

from dataprep.moses import Moses, detokenise, tokenise

SETTINGS = {
    "IWSLT'14": Moses(lowercase=True),
    "WMT'14": Moses(aggressive_hyphens=True, normalise_punctuation=True),
}
SHOWN_KINDS = 5

_MASKS = {"Lu": "A", "Ll": "a", **dict.fromkeys(["Lt", "Lm", "Lo"], "L")}
_MASKS |= dict.fromkeys(["Nd", "Nl", "No"], "0")


def split_lines(text: str) -> list[str]:
    """The lines of a text; other characters than line feeds end none."""
    return text.removesuffix("\n").split("\n")


class Scripts:
    """The Perl scripts in a clone of mosesdecoder."""

    def __init__(self, moses: Path) -> None:
        self._folder = moses / "scripts" / "tokenizer"

    def tokenise(self, lines: Sequence[str], language: str, moses: Moses) -> list[str]:
        text = lines
        if moses.normalise_punctuation:
            text = self._run("normalize-punctuation.perl", text, "-l", language)
            text = self._run("remove-non-printing-char.perl", text)
        hyphens = ["-a"] if moses.aggressive_hyphens else []
        text = self._run("tokenizer.perl", text, "-q", "-l", language, *hyphens)
        return self._run("lowercase.perl", text) if moses.lowercase else text

    def detokenise(self, lines: Sequence[str], language: str) -> list[str]:
        return self._run("detokenizer.perl", lines, "-q", "-l", language)

    def digests(self) -> dict[str, str]:
        """What tells versions of the scripts apart."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted(self._folder.glob("*.perl"))
        }

    def _run(self, script: str, lines: Sequence[str], *options: str) -> list[str]:
        text = "".join(f"{line}\n" for line in lines)
        command = ["perl", str(self._folder / script), *options]
        done = subprocess.run(command, input=text.encode(), stdout=subprocess.PIPE, check=True)
        return split_lines(done.stdout.decode())


@dataclass(frozen=True)
class Text:
    name: str
    language: str
    lines: list[str]


@dataclass(frozen=True)
class Kind:
    """Differences of one kind.

    Attributes:
        perl, ours: shapes of the tokens that differ, as `shape` gives them.
        lines: how many lines have one.
        example: the first one's tokens.
    """

    perl: str
    ours: str
    lines: int
    example: str


@dataclass(frozen=True)
class Agreement:
    """One text in one setting.

    Attributes:
        lines: how many the text has.
        tokenised: how many of them agree.
        sacremoses: the same for sacremoses without data-prep's corrections.
        detokenised: of the lines tokenised by Perl, how many are joined to the same text.
        kinds: the commonest differences between `tokenised` lines.
    """

    text: str
    language: str
    setting: str
    lines: int
    tokenised: int
    sacremoses: int
    detokenised: int
    kinds: list[Kind]


def compare(text: Text, setting: str, scripts: Scripts) -> Agreement:
    moses = SETTINGS[setting]
    perl = scripts.tokenise(text.lines, text.language, moses)
    ours = tokenise(text.lines, text.language, moses)
    joined = scripts.detokenise(perl, text.language)
    return Agreement(
        text.name,
        text.language,
        setting,
        len(text.lines),
        agreeing(perl, ours),
        agreeing(perl, sacremoses_alone(text, moses)),
        agreeing(joined, detokenise(perl, text.language)),
        kinds(perl, ours),
    )


def sacremoses_alone(text: Text, moses: Moses) -> list[str]:
    """What its own options come closest with."""
    normalizer = MosesPunctNormalizer(
        text.language, perl_parity=True, post_remove_control_chars=True
    )
    tokenizer = MosesTokenizer(text.language)
    lines = text.lines
    if moses.normalise_punctuation:
        lines = [normalizer.normalize(line) for line in lines]
    tokenised = [tokenizer.tokenize(line, moses.aggressive_hyphens, True) for line in lines]
    return [line.lower() for line in tokenised] if moses.lowercase else tokenised


def agreeing(perl: Sequence[str], ours: Sequence[str]) -> int:
    return sum(a.split() == b.split() for a, b in zip(perl, ours, strict=True))


def kinds(perl: Sequence[str], ours: Sequence[str]) -> list[Kind]:
    """The differences that most lines have, the commonest first."""
    lines: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for pair in zip(perl, ours, strict=True):
        found = {(shape(a), shape(b)): f"{a} / {b}" for a, b in differences(*pair)}
        lines.update(found.keys())
        examples = found | examples
    return [
        Kind(*shapes, count, examples[shapes]) for shapes, count in lines.most_common(SHOWN_KINDS)
    ]


def differences(perl: str, ours: str) -> Iterator[tuple[str, str]]:
    """The stretches of tokens that two lines do not share."""
    first, second = perl.split(), ours.split()
    for what, *ends in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        if what != "equal":
            start, end, other_start, other_end = ends
            yield " ".join(first[start:end]), " ".join(second[other_start:other_end])


def shape(text: str) -> str:
    """A run of capitals is "A", of small letters "a", of other letters "L", of numbers "0".

    Of tokens that then are alike, one after the other, two are left.
    """
    masked = "".join(_MASKS.get(unicodedata.category(char), char) for char in text)
    runs = re.sub(r"([AaL0])\1+", r"\1", masked)
    return re.sub(r"(?<!\S)(\S+)(?: \1)+(?!\S)", r"\1 \1", runs)


def rate_table(agreements: Sequence[Agreement]) -> Table:
    header = ["text", "language", "lines", "as for", "tokenised alike", "sacremoses alone"]
    header += ["detokenised alike"]
    rows = [
        [a.text, a.language, f"{a.lines:,}", a.setting]
        + [percentage(count, a.lines) for count in (a.tokenised, a.sacremoses, a.detokenised)]
        for a in agreements
    ]
    return Table("Lines that agree with the Perl scripts", header, rows)


def percentage(count: int, total: int) -> str:
    """To two places, but 100 only if nothing is missing."""
    exact = 100 * count / total
    return "100 %" if count == total else f"{min(exact, 99.99):.2f} %"


def kind_table(agreements: Sequence[Agreement]) -> Table:
    header = ["text", "language", "as for", "Perl", "data-prep", "lines", "example"]
    rows = [
        [a.text, a.language, a.setting, kind.perl, kind.ours, f"{kind.lines:,}", kind.example]
        for a in agreements
        for kind in a.kinds
    ]
    return Table("Kinds of difference", header, rows)


def perl_version() -> str:
    command = ["perl", "-e", "print $^V"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moses", type=Path, help="a clone of mosesdecoder")
    parser.add_argument(
        "--text",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "LANGUAGE", "FILE"),
        help="text to compare on, one sentence a line; can be repeated",
    )
    parser.add_argument("--table", action="store_true", help="print what the last run wrote")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    if not options.table and not (options.moses and options.text):
        parser.error("give --moses and at least one --text, or --table")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    path = options.results / "moses-agreement.json"
    if not options.table:
        torch.set_num_threads(1)
        scripts = Scripts(options.moses)
        texts = [
            Text(name, language, split_lines(Path(file).read_bytes().decode()))
            for name, language, file in options.text
        ]
        agreements = [compare(text, setting, scripts) for text in texts for setting in SETTINGS]
        tables = [rate_table(agreements), kind_table(agreements)]
        results = {
            "perl": perl_version(),
            "scripts": scripts.digests(),
            "sacremoses": importlib.metadata.version("sacremoses"),
            "tables": [*map(asdict, tables)],
            "agreements": [*map(asdict, agreements)],
        }
        write(path, results)
    print(markdown(read(path)), end="")


if __name__ == "__main__":
    main()
