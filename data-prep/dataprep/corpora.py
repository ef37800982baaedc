"""The table of corpora. A corpus is data: a new one is a new entry in `CORPORA`, not new code."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dataprep.catalogues import GettextCatalogues, JsonCatalogues
from dataprep.cleaning import Cleaning
from dataprep.downloads import SourceFile
from dataprep.filters import (
    Empty,
    Identical,
    LengthRatio,
    Markup,
    NoWords,
    Placeholders,
    TokenLengths,
    TooLong,
    TooShort,
    WordRatio,
    WrongScript,
)
from dataprep.moses import Moses
from dataprep.origins import (
    HelpPackages,
    Origin,
    Package,
    PublishedTexts,
    ReversedDigits,
    Terms,
    Wheel,
)
from dataprep.splitting import AsPublished, EveryNth, HeldOut, Split
from dataprep.texts import TextSource

MOSES_BPE = "moses+bpe"
SENTENCEPIECE = "sentencepiece"
TOKENISATIONS = (MOSES_BPE, SENTENCEPIECE)


@dataclass(frozen=True)
class Corpus:
    """A corpus and everything that decides what comes out of it.

    Attributes:
        languages: the two language codes, in the order in which pairs are read; empty if the user
            chooses them.
        default_source: the language that is translated from unless the user says otherwise; empty
            if the other one than English is.
        cleaning: what is done to it. Filters apply to what was published for training.
        split: what of it is trained on.
        vocab_size: pieces in the joint vocabulary, or merge operations of BPE.
        tokenisation: one of `TOKENISATIONS`, unless the user says otherwise.
        moses: how the Moses tokeniser is to treat it, if it is used.
        joined_dictionary: whether both languages share one, after Moses and BPE. Sentencepiece's
            is always shared.
        with_text: pairs with text on both sides that a part has before it is filtered and split,
            where that is known; other numbers are an error.
        expected: pairs that a part has in the end, where that is known; other numbers are an error.
        disk_bytes: space that everything takes, fetched files included, roughly, if it is much.
    """

    name: str
    languages: tuple[str, str] | tuple[()]
    default_source: str
    origins: tuple[Origin, ...]
    cleaning: Cleaning
    split: Split
    vocab_size: int
    tokenisation: str = SENTENCEPIECE
    moses: Moses = field(default_factory=Moses)
    joined_dictionary: bool = True
    with_text: Mapping[str, int] = field(default_factory=dict)
    expected: Mapping[str, int] = field(default_factory=dict)
    disk_bytes: int = 0


_QUICKSTART_WHEELS = (
    Wheel(
        "homeassistant",
        "2026.11.0",
        "7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7",
        "Apache-2.0",
        JsonCatalogues("homeassistant/components/*/translations/{language}.json"),
    ),
    Wheel(
        "pretix",
        "2026.8.0",
        "a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85",
        "Apache-2.0",
        GettextCatalogues("pretix/locale/{language}/LC_MESSAGES/*.mo"),
    ),
)

QUICKSTART = Corpus(
    name="quickstart",
    languages=("en", "de"),
    default_source="de",
    origins=_QUICKSTART_WHEELS,
    cleaning=Cleaning(
        "plain typography",
        (
            Empty(),
            NoWords(),
            Identical(),
            Markup(),
            Placeholders(),
            TooShort(words=2),
            TooLong(words=25),
            LengthRatio(ratio=2.0, slack=5),
        ),
        drop_duplicates=True,
    ),
    # Multiples of 8: where batch sizes must be multiples of 8, which is fairseq's default,
    # ve-fairseq 0.12.3 leaves out what remains of a data set, its longest sentences.
    split=HeldOut(valid=496, test=704),
    vocab_size=4000,
)


def _sides(name: str, other: str = "de") -> tuple[str, str]:
    """The names of a text's two files, the one that is not English first."""
    return name.format(other), name.format("en")


# The commit that added the files, and the last one that touched them.
_MULTI30K = "https://github.com/multi30k/dataset/raw/c9be912dc05a3ebf9ae5bb5f7f58c1791cda43ab/data/task1/raw"
_MULTI30K_SHA256 = {
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
}

MULTI30K_DE_EN = Corpus(
    name="multi30k-de-en",
    languages=("de", "en"),
    default_source="de",
    origins=(
        PublishedTexts(
            files=tuple(
                SourceFile(f"{_MULTI30K}/{filename}", f"sha256:{sha256}")
                for filename, sha256 in _MULTI30K_SHA256.items()
            ),
            sources=(
                TextSource("train", _sides("train.{}.gz")),
                TextSource("valid", _sides("val.{}.gz")),
                TextSource("test", _sides("test_2016_flickr.{}.gz")),
            ),
            terms=Terms(
                "no open licence; for non-commercial research and education",
                "D. Elliott, S. Frank, K. Sima'an, L. Specia: Multi30K: Multilingual "
                "English-German Image Descriptions. Proceedings of the 5th Workshop on Vision and "
                "Language, 2016, doi:10.18653/v1/W16-3210",
            ),
        ),
    ),
    cleaning=Cleaning("single spaces"),
    split=AsPublished(),
    vocab_size=4000,
    moses=Moses(lowercase=True),
    expected={"train": 29_000, "valid": 1_014, "test": 1_000},
)

_IWSLT14_MOSES = Moses(lowercase=True)
_IWSLT14_TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")

IWSLT14_DE_EN = Corpus(
    name="iwslt14-de-en",
    languages=("de", "en"),
    default_source="de",
    origins=(
        PublishedTexts(
            # As fetched from there twice in May 2021, and committed to github.com/
            # facebookresearch/fairseq by mistake: examples/translation/orig/ of 5f7bc3f60, pull
            # request 3553.
            files=(
                SourceFile(
                    "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz",
                    "git-sha1:aa8c3f40f8836f1d43701448f94fe7e230082b4c",
                ),
            ),
            sources=(
                TextSource("train", _sides("de-en/train.tags.de-en.{}"), "de-en.tgz", "tagged"),
                *(
                    TextSource(
                        "test",
                        _sides(f"de-en/IWSLT14.{name}.de-en.{{}}.xml"),
                        "de-en.tgz",
                        "segments",
                        replacements=(("\u2019", "'"),),
                    )
                    for name in _IWSLT14_TEST_SETS
                ),
            ),
            terms=Terms(
                "CC-BY-NC-ND-3.0",
                "M. Cettolo, J. Niehues, S. St\u00fcker, L. Bentivogli, M. Federico: Report on the "
                "11th IWSLT Evaluation Campaign, IWSLT 2014; M. Cettolo, C. Girardi, M. Federico: "
                "WIT3: Web Inventory of Transcribed and Translated Talks, EAMT 2012",
            ),
        ),
    ),
    cleaning=Cleaning(
        "single spaces", (Empty(), TokenLengths(most=175, ratio=1.5, moses=_IWSLT14_MOSES))
    ),
    split=EveryNth(23),
    vocab_size=10_000,
    tokenisation=MOSES_BPE,
    moses=_IWSLT14_MOSES,
    joined_dictionary=False,
    expected={"train": 160_239, "valid": 7_283, "test": 6_750},
)

_STATMT = "http://www.statmt.org"

# The sums of training texts and of the development sets as TensorFlow Datasets recorded them
# (url_checksums/wmt14_translate.txt and wmt15_translate.txt), that of the test sets as sacrebleu
# has it for its set wmt14/full.
_EUROPARL = SourceFile(
    f"{_STATMT}/wmt13/training-parallel-europarl-v7.tgz",
    "sha256:0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
)
_COMMON_CRAWL = SourceFile(
    f"{_STATMT}/wmt13/training-parallel-commoncrawl.tgz",
    "sha256:c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
)
_UNITED_NATIONS = SourceFile(
    f"{_STATMT}/wmt13/training-parallel-un.tgz",
    "sha256:29141b5c1eba149a94f7a59d3b1a834b2e47fe0f8758d68dcd77a3d3f497ee47",
)
_NEWS_COMMENTARY = SourceFile(
    f"{_STATMT}/wmt14/training-parallel-nc-v9.tgz",
    "sha256:cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485",
)
_GIGA_FREN = SourceFile(
    f"{_STATMT}/wmt10/training-giga-fren.tar",
    "sha256:3ff8319f6919393520559bfbc7ad6a747ec81b3abc7be9993b338d4b017b4d9a",
)
_WMT_DEVELOPMENT = SourceFile(
    "http://data.statmt.org/wmt19/translation-task/dev.tgz",
    "sha256:7a7deccf82ebb05ba508dba5eb21356492224e8f630ec4f992132b029b4b25e7",
)
_WMT14_TEST = SourceFile(
    "https://statmt.org/wmt14/test-full.tgz", "md5:a8cd784e006feb32ac6f3d9ec7eb389a"
)
_WMT14_TERMS = Terms(
    "each text's own; no one licence for all",
    "O. Bojar and others: Findings of the 2014 Workshop on Statistical Machine Translation. "
    "Proceedings of the Ninth Workshop on Statistical Machine Translation, 2014, pages 12-58",
)
_WMT14_MOSES = Moses(aggressive_hyphens=True, normalise_punctuation=True)


def _wmt14(other: str, *training: tuple[SourceFile, str]) -> PublishedTexts:
    """Training texts, each with its archive, newstest2013 and 2014; all of them with English."""
    return PublishedTexts(
        files=(*(file for file, _ in training), _WMT_DEVELOPMENT, _WMT14_TEST),
        sources=(
            *(
                TextSource("train", _sides(name, other), archive=file.filename)
                for file, name in training
            ),
            TextSource(
                "valid", _sides("dev/newstest2013.{}", other), archive=_WMT_DEVELOPMENT.filename
            ),
            TextSource(
                "test",
                (
                    f"test-full/newstest2014-{other}en-ref.{other}.sgm",
                    f"test-full/newstest2014-{other}en-src.en.sgm",
                ),
                archive=_WMT14_TEST.filename,
                form="segments",
            ),
        ),
        terms=_WMT14_TERMS,
    )


WMT14_EN_DE = Corpus(
    name="wmt14-en-de",
    languages=("de", "en"),
    default_source="en",
    origins=(
        _wmt14(
            "de",
            (_EUROPARL, "training/europarl-v7.de-en.{}"),
            (_COMMON_CRAWL, "commoncrawl.de-en.{}"),
            (_NEWS_COMMENTARY, "training/news-commentary-v9.de-en.{}"),
        ),
    ),
    # clean-corpus-n.perl's usual ratio, and the length of fairseq's prepare-wmt14en2de.sh.
    cleaning=Cleaning("single spaces", (Empty(), TooLong(words=250), WordRatio(ratio=9.0))),
    split=AsPublished(),
    vocab_size=32_000,
    tokenisation=MOSES_BPE,
    moses=_WMT14_MOSES,
    # Pairs with text on both sides, as counted for wmt/wmt14, "de-en", on huggingface.co/datasets.
    with_text={"train": 4_508_785, "valid": 3_000, "test": 3_003},
    expected={"valid": 3_000, "test": 3_003},
    disk_bytes=8_000_000_000,
)

WMT14_EN_FR = Corpus(
    name="wmt14-en-fr",
    languages=("fr", "en"),
    default_source="en",
    origins=(
        _wmt14(
            "fr",
            (_EUROPARL, "training/europarl-v7.fr-en.{}"),
            (_COMMON_CRAWL, "commoncrawl.fr-en.{}"),
            (_UNITED_NATIONS, "un/undoc.2000.fr-en.{}"),
            (_NEWS_COMMENTARY, "training/news-commentary-v9.fr-en.{}"),
            (_GIGA_FREN, "giga-fren.release2.fixed.{}.gz"),
        ),
    ),
    # The script's limits. It applies them to the pieces of BPE, which are learnt later here.
    cleaning=Cleaning(
        "single spaces", (Empty(), TokenLengths(most=250, ratio=1.5, moses=_WMT14_MOSES))
    ),
    split=AsPublished(),
    vocab_size=40_000,
    tokenisation=MOSES_BPE,
    moses=_WMT14_MOSES,
    with_text={"valid": 3_000, "test": 3_003},
    expected={"valid": 3_000, "test": 3_003},
    disk_bytes=70_000_000_000,
)

_MANUAL_TERMS = Terms(
    "MPL-2.0",
    "The LibreOffice contributors and translators: LibreOffice Help, The Document Foundation, in "
    "the version that the inputs name",
)

LIBREOFFICE_HELP = Corpus(
    name="libreoffice-help",
    languages=(),
    default_source="",
    origins=(HelpPackages(_MANUAL_TERMS),),
    cleaning=Cleaning(
        "plain typography",
        (
            Empty(),
            NoWords(),
            Identical(),
            Markup(),
            Placeholders(),
            WrongScript(),
            TooShort(words=2),
            TooLong(words=80, characters=600),
            LengthRatio(ratio=2.0, slack=20),
        ),
        drop_duplicates=True,
    ),
    split=HeldOut(valid=1_000, test=1_000),
    vocab_size=8_000,
)


_GTK, _KDE = "_", "&"  # how labels mark the letter that chooses them


_SOFTWARE_WHEELS = (
    *_QUICKSTART_WHEELS,
    Wheel(
        "gramps",
        "6.0.8",
        "56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c",
        "GPL-2.0-or-later",
        GettextCatalogues("gramps-*.data/data/share/locale/{language}/LC_MESSAGES/gramps.mo", _GTK),
    ),
    Wheel(
        "weblate",
        "2026.10.1",
        "27a779ceb05fec3665081df0d3f46f4b6ac0e3f499160a1c3cb145e8e35853d2",
        "GPL-3.0-or-later",
        GettextCatalogues("weblate/locale/{language}/LC_MESSAGES/*.mo"),
    ),
    Wheel(
        "indico",
        "3.3.14",
        "d98e030e0f21d22b9d9423d7cb3f9fca472ac5c2c4f3d8c5d7026ed3ed6c9811",
        "MIT",
        GettextCatalogues("indico/translations/{language}_DE/LC_MESSAGES/messages.mo"),
    ),
    Wheel(
        "mayan-edms",
        "4.12.2",
        "5eb0deccb29199a7add33a757161f3f461aa3b00451de13027049258dd412f67",
        "GPL-2.0-only",
        GettextCatalogues("mayan/apps/*/locale/{language}_DE/LC_MESSAGES/django.mo"),
        tags="py2.py3-none-any",
    ),
)


def _gettext_package(
    domain: str,
    package: str,
    program: str,
    licence: str,
    mnemonics: str,
    asides: str = "",
    pattern: str = "usr/share/locale/{language}/LC_MESSAGES/*.mo",
) -> Package:
    reader = GettextCatalogues(pattern, mnemonics, asides)
    return Package(package, program, licence, reader, domain)


_SOFTWARE: tuple[Origin, ...] = (
    *(replace(wheel, domain="apps") for wheel in _SOFTWARE_WHEELS),
    HelpPackages(_MANUAL_TERMS, "help"),
    _gettext_package(
        "office",
        "libreoffice-l10n-de",
        "LibreOffice",
        "MPL-2.0",
        "_~",
        pattern="usr/lib/libreoffice/program/resource/{language}/LC_MESSAGES/*.mo",
    ),
    *(
        _gettext_package(*columns)
        for columns in (
            ("graphics", "gimp-data", "GIMP", "GPL-3.0-or-later", _GTK),
            ("graphics", "inkscape", "Inkscape", "GPL", _GTK),
            ("graphics", "digikam-data", "digiKam", "GPL-2.0-or-later", _KDE),
            ("graphics", "krita-l10n", "Krita", "GPL and LGPL", _KDE),
            ("graphics", "darktable", "darktable", "GPL-3.0-or-later", _GTK),
            ("desktop", "evolution-common", "Evolution", "LGPL-2.0-only OR LGPL-3.0-only", _GTK),
            ("desktop", "claws-mail-i18n", "Claws Mail", "GPL-3.0-or-later", _GTK),
            ("desktop", "pidgin-data", "Pidgin", "GPL-2.0-or-later", _GTK),
            ("desktop", "gnucash-common", "GnuCash", "GPL-2.0-or-later", _GTK),
            ("desktop", "kmymoney-common", "KMyMoney", "GPL-2.0-or-later", _KDE),
            ("desktop", "gnumeric-common", "Gnumeric", "GPL-2.0-only OR GPL-3.0-only", _GTK),
            ("desktop", "audacity-data", "Audacity", "CC-BY-3.0 OR GPL-2.0-or-later", _KDE),
        )
    ),
    # "Copy|C" has a mnemonic too, "Author[[the first]]" says what is meant.
    _gettext_package(
        "desktop", "lyx-common", "LyX", "GPL-2.0-or-later", _KDE, r"\|\w$|\[\[.*?\]\]"
    ),
    # "?female:Mayor %s" is a mayor who is a woman.
    _gettext_package("games", "freeciv-data", "Freeciv", "GPL-2.0-or-later", _GTK, r"^\?[^:]+:"),
)

SOFTWARE_DE_EN = Corpus(
    name="software-de-en",
    languages=("de", "en"),
    default_source="de",
    origins=_SOFTWARE,
    cleaning=LIBREOFFICE_HELP.cleaning,
    # Of each domain; multiples of 8 for the reason that the quickstart has.
    split=HeldOut(valid=200, test=504),
    vocab_size=10_000,
)

NUMBERS = Corpus(
    name="numbers",
    languages=("de", "en"),
    default_source="de",
    origins=(ReversedDigits(Terms("MIT", "fairseq-gradinit, data-prep/dataprep/origins.py")),),
    cleaning=Cleaning("single spaces"),
    split=AsPublished(),
    vocab_size=40,
    tokenisation=MOSES_BPE,
    expected={"train": 2_000, "valid": 50, "test": 50},
)

CORPORA = {
    corpus.name: corpus
    for corpus in (
        NUMBERS,
        QUICKSTART,
        MULTI30K_DE_EN,
        IWSLT14_DE_EN,
        WMT14_EN_DE,
        WMT14_EN_FR,
        LIBREOFFICE_HELP,
        SOFTWARE_DE_EN,
    )
}
