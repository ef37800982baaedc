"""Where text comes from: what is fetched, and how aligned pairs are read out of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import Protocol

from dataprep import DataPrepError
from dataprep.archives import unpack
from dataprep.catalogues import Reader, read_package, read_wheel
from dataprep.checksums import file_sha256
from dataprep.downloads import SourceFile, obtain_files
from dataprep.help_pages import read_pages
from dataprep.packages import check_versions, obtain_packages, package_version
from dataprep.pairs import Pair
from dataprep.texts import TextSource, read_pairs
from dataprep.wheels import Wheel, obtain_wheels

Files = Mapping[str, Path]

Inputs = list[dict[str, str]]
"""What tells others exactly which files a corpus was made of."""


@dataclass(frozen=True)
class Terms:
    """Under which terms a text may be used.

    Attributes:
        licence: in a few words, or as an SPDX expression.
        licence_evidence: where that is stated.
        citation: whom to name when the text is used.
    """

    licence: str
    licence_evidence: str
    citation: str


@dataclass(frozen=True)
class Stretch:
    """Pairs that come from one place.

    Attributes:
        part: the part of the corpus that they were published for: train, valid or test.
        name: what they are counted under.
        pairs: the pairs, read as they are asked for.
        left_out: how much of the place is not among them, by the reason.
        domain: what kind of text they are, where a corpus has several.
    """

    part: str
    name: str
    pairs: Iterator[Pair]
    left_out: Mapping[str, int] = field(default_factory=dict)
    domain: str = ""


class Origin(Protocol):
    """Fetches files, and reads pairs from them in an order that depends on their content alone."""

    def terms(self) -> tuple[Terms, ...]:
        """Under which terms the text may be used."""

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
            scratch: an empty folder to unpack into, which stays until the last pair is read.

        Raises:
            DataPrepError: a file does not hold what it should.
        """

    def inputs(self, files: Files) -> Inputs:
        """What goes into the manifest about files that were obtained."""


@dataclass(frozen=True)
class Wheels:
    """Message catalogues in pinned Python wheels, all for training."""

    wheels: tuple[Wheel, ...]

    def terms(self) -> tuple[Terms, ...]:
        return tuple(Terms(w.licence, w.licence_evidence, w.citation) for w in self.wheels)

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        return obtain_wheels(self.wheels, cache, _folder(mirror, "pip fetches the wheels"))

    def read(self, files: Files, languages: tuple[str, str], scratch: Path) -> Iterator[Stretch]:
        for wheel in self.wheels:
            pairs = iter(read_wheel(files[wheel.project], wheel.reader, languages))
            yield Stretch("train", wheel.project, pairs)

    def inputs(self, files: Files) -> Inputs:
        return [
            {
                "project": wheel.project,
                "version": wheel.version,
                "file": wheel.filename,
                "sha256": wheel.sha256,
            }
            for wheel in self.wheels
        ]


@dataclass(frozen=True)
class PublishedTexts:
    """Texts that their authors publish as files, alone or in archives.

    Attributes:
        files: what is fetched.
        sources: the texts in them, those of a part one after the other.
        licensed: under which terms.
    """

    files: tuple[SourceFile, ...]
    sources: tuple[TextSource, ...]
    licensed: Terms

    def terms(self) -> tuple[Terms, ...]:
        return (self.licensed,)

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        return obtain_files(self.files, cache, mirror)

    def read(self, files: Files, languages: tuple[str, str], scratch: Path) -> Iterator[Stretch]:
        for source in self.sources:
            if source.archive is None:
                paths = tuple(files[name] for name in source.names)
            else:
                paths = self._unpacked(source.archive, files, scratch / source.archive, source)
            name = source.names[0].rpartition("/")[2]
            yield Stretch(source.part, name, read_pairs(source, (paths[0], paths[1])))

    def _unpacked(
        self, archive: str, files: Files, folder: Path, source: TextSource
    ) -> tuple[Path, ...]:
        """Where the texts of a source lie; the first one of an archive has all of it unpacked."""
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

    def inputs(self, files: Files) -> Inputs:
        return [
            {
                "file": file.filename,
                "address": file.address,
                "sha256": file_sha256(files[file.filename]),
            }
            for file in self.files
        ]


_DIGITS = {
    "de": ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"],
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
}


@dataclass(frozen=True)
class ReversedDigits:
    """A toy made without files: digits in German words, and backwards in English words."""

    licensed: Terms

    def terms(self) -> tuple[Terms, ...]:
        return (self.licensed,)

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        if mirror is not None:
            raise DataPrepError("--mirror does not apply to this corpus: nothing is fetched.")
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

    def inputs(self, files: Files) -> Inputs:
        return []


@dataclass(frozen=True)
class HelpPackages:
    """LibreOffice's manual in Debian's or Ubuntu's packages, all for training."""

    licensed: Terms

    def terms(self) -> tuple[Terms, ...]:
        return (self.licensed,)

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        names = [_package(language) for language in languages]
        files = obtain_packages(names, cache, _folder(mirror, "apt-get fetches the packages"))
        check_versions(files)
        return files

    def read(self, files: Files, languages: tuple[str, str], scratch: Path) -> Iterator[Stretch]:
        first, second = (files[_package(language)] for language in languages)
        pages = read_pages(first, second, languages)
        yield Stretch("train", "manual", iter(pages.pairs), pages.left_out)

    def inputs(self, files: Files) -> Inputs:
        return [_package_input(name, path) for name, path in files.items()]


@dataclass(frozen=True)
class CataloguePackage:
    """A Debian package of message catalogues.

    Attributes:
        name: the package's.
        licensed: the terms of the messages.
        reader: how aligned pairs are read out of it.
    """

    name: str
    licensed: Terms
    reader: Reader


@dataclass(frozen=True)
class CataloguePackages:
    """Message catalogues in Debian's or Ubuntu's packages, all for training."""

    packages: tuple[CataloguePackage, ...]

    def terms(self) -> tuple[Terms, ...]:
        return tuple(package.licensed for package in self.packages)

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        names = [package.name for package in self.packages]
        return obtain_packages(names, cache, _folder(mirror, "apt-get fetches the packages"))

    def read(self, files: Files, languages: tuple[str, str], scratch: Path) -> Iterator[Stretch]:
        for package in self.packages:
            pairs = read_package(files[package.name], package.reader, languages)
            yield Stretch("train", package.name, iter(pairs))

    def inputs(self, files: Files) -> Inputs:
        return [_package_input(name, path) for name, path in files.items()]


def _package_input(name: str, path: Path) -> dict[str, str]:
    return {
        "package": name,
        "version": package_version(path),
        "file": path.name,
        "sha256": file_sha256(path),
    }


@dataclass(frozen=True)
class Domains:
    """Several origins, all for training, each of a domain with test sentences of its own.

    Attributes:
        origins: by the name of the domain, which its files are named for.
    """

    origins: tuple[tuple[str, Origin], ...]

    def terms(self) -> tuple[Terms, ...]:
        return tuple(terms for _, origin in self.origins for terms in origin.terms())

    def obtain(self, languages: tuple[str, str], cache: Path, mirror: str | None) -> Files:
        return {
            f"{domain}/{name}": path
            for domain, origin in self.origins
            for name, path in origin.obtain(languages, cache, mirror).items()
        }

    def read(self, files: Files, languages: tuple[str, str], scratch: Path) -> Iterator[Stretch]:
        for domain, origin in self.origins:
            for stretch in origin.read(_of(domain, files), languages, scratch / domain):
                yield replace(stretch, domain=domain)

    def inputs(self, files: Files) -> Inputs:
        return [
            {"domain": domain, **described}
            for domain, origin in self.origins
            for described in origin.inputs(_of(domain, files))
        ]


def _of(domain: str, files: Files) -> Files:
    """Those of a domain, under the names that its origin gave them."""
    start = f"{domain}/"
    return {n.removeprefix(start): path for n, path in files.items() if n.startswith(start)}


def _package(language: str) -> str:
    """The English manual's package is named for American English."""
    return f"libreoffice-help-{'en-us' if language == 'en' else language.lower()}"


def _folder(mirror: str | None, fetcher: str) -> Path | None:
    if mirror is not None and "://" in mirror:
        raise DataPrepError(
            f"{fetcher} of this corpus, so that --mirror can only name a folder that holds them; "
            f"{mirror} is an address."
        )
    return None if mirror is None else Path(mirror)
