"""Cleaning, reading and splitting, without files other than miniature wheels."""

import gettext
import io
import json
import struct
from collections import Counter
from itertools import repeat

import pytest
from dataprep import DataPrepError, Pair
from dataprep.catalogues import GettextCatalogues, JsonCatalogues, matches, without_mnemonic
from dataprep.cleaning import Cleaning, clean
from dataprep.corpora import QUICKSTART
from dataprep.filters import (
    Empty,
    LengthRatio,
    TokenLengths,
    TooLong,
    TooShort,
    WordRatio,
    WrongScript,
)
from dataprep.moses import Moses
from dataprep.normalising import MATCHES, mask_key, plain_typography
from dataprep.splitting import HeldOut, overlap
from dataprep.texts import TextSource, read_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

RULES = QUICKSTART.cleaning
KANJI = "\u6f22\u5b57"
CYRILLIC = "\u0441\u043b\u043e\u0432\u043e"


def compiled_catalogue(messages):
    """The bytes of a .mo file; gettext's own format, sorted by message as it asks for."""
    header = {
        "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n!=1;\n"
    }
    entries = sorted((k.encode(), v.encode()) for k, v in (header | messages).items())
    count = len(entries)
    offset = 28 + 16 * count
    tables, data = ([], []), b""
    for side in (0, 1):
        for entry in entries:
            tables[side].append(struct.pack("<II", len(entry[side]), offset + len(data)))
            data += entry[side] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    return head + b"".join(tables[0]) + b"".join(tables[1]) + data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  two\n lines\tand\u00a0a no-break  space ", "two lines and a no-break space"),
        ("\u201eWort\u201c \u201aso\u2018 it\u2019s \u00abici\u00bb", '"Wort" \'so\' it\'s "ici"'),
        ("1\u20132 \u2014 end\u2026", "1-2 - end..."),
        ("Ko\u00adpie\u200b", "Kopie"),
        ("u\u0308ber", "\u00fcber"),
        ("CO\u2082 in m\u00b3 at 20 \u00ba", "CO\u2082 in m\u00b3 at 20 \u00b0"),
    ],
)
def test_normalise(text, expected):
    assert plain_typography(text) == expected
    assert plain_typography(expected) == expected


def cleaned(pairs, cleaning=RULES):
    """The pairs that are left, and how many each filter removed."""
    removed = Counter()
    return list(clean(pairs, cleaning, ("en", "de"), removed, set())), removed


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("empty", "Some text", " \u200b "),
        ("no-words", "12 / 34", "Zahl 12 / 34"),
        ("identical", "Home Assistant", "home assistant."),
        ("markup", "Read <b>this</b> now", "Lies <b>das</b> jetzt"),
        ("markup", "See https://example.org now", "Siehe https://example.org nun"),
        ("markup", "See [the guide]({url}) now", "Siehe [Anleitung]({url}) nun"),
        ("markup", "This &amp; that", "Dies &amp; das"),
        ("markup", "{n, plural, one {day} other {days}}", "{n, plural, one {Tag} other {Tage}}"),
        ("placeholders", "Hello {name} there", "Hallo {user} dort"),
        ("placeholders", "At most %(n)s times", "H\u00f6chstens %(n)s von %(n)s Mal"),
        ("too-short", "Kitchen", "K\u00fcche"),
        ("too-long", "word " * 26, "Wort " * 25),
        ("length-ratio", "On it", "Dies ist bei weitem zu lang"),
        (None, "Turn on {name}", "{name} einschalten"),
        (None, "word " * 25, "Wort " * 25),
        (None, "Back to %(order)s: 100 % done", "Zur\u00fcck zu %(order)s: 100 % fertig"),
    ],
)
def test_each_filter_removes_and_counts(name, first, second):
    left, removed = cleaned([Pair(first, second)])
    assert left == ([] if name else [Pair(first.strip(), second.strip())])
    assert {key: count for key, count in removed.items() if count} == ({name: 1} if name else {})


@pytest.mark.parametrize(
    ("step", "languages", "removed", "kept"),
    [
        (TooLong(words=3), ("en", "de"), ("a b c d", "a"), ("a b c", "a")),
        (TooLong(words=9, characters=4), ("en", "zh"), ("a", "abcde"), ("a", "abcd")),
        (WordRatio(2), ("en", "de"), ("a", "b c d"), ("a", "b c")),
        (LengthRatio(2, 1), ("en", "de"), ("abcdef", "ab"), ("abcde", "ab")),
        (LengthRatio(2, 1), ("en", "zh"), ("abcdefghijklmn", KANJI), ("abcdefghijkl", KANJI)),
        (WrongScript(), ("en", "ru"), ("a", f"word {CYRILLIC[:2]}"), ("a", f"{CYRILLIC} ab")),
        (WrongScript(), ("en", "ja"), ("a", "Kanji"), ("a", f"\u30ab\u30ca\u3068{KANJI}")),
        (WrongScript(), ("de", "pt-br"), (f"{CYRILLIC} a", "a"), (f"\u00c4h {KANJI}", "\u00e7a")),
        # "don't" and a full stop are two tokens each.
        (TokenLengths(4, 9), ("en", "de"), ("I don't know.", "a b"), ("I don't.", "a b")),
        (TokenLengths(99, 1.5), ("en", "de"), ("a b c.", "d e"), ("a b.", "d e")),
        (TokenLengths(99, 1.5, Moses(lowercase=True)), ("en", "de"), ("", "d"), ("c", "d")),
    ],
)  # fmt: skip
def test_limits(step, languages, removed, kept):
    assert step.removes(Pair(*removed), languages)
    assert not step.removes(Pair(*kept), languages)


def test_duplicates_differ_in_neither_words_nor_numbers():
    pairs = [
        Pair("Open the door", "\u00d6ffne die T\u00fcr"),
        Pair("open the door!", "\u00f6ffne die T\u00fcr."),
        Pair("Open the door", "Die T\u00fcr \u00f6ffnen"),
        Pair("Open door 1", "\u00d6ffne T\u00fcr 1"),
        Pair("Open door 2", "\u00d6ffne T\u00fcr 2"),
    ]
    left, removed = cleaned(pairs)
    assert left == [pairs[0], *pairs[2:]]
    assert removed["duplicate"] == 1


def read(reader, files, languages):
    """The pairs of those files that have a catalogue's name."""
    found = {name: files[name] for name in files if matches(name, reader.pattern, languages)}
    return list(reader.read(found, languages))


def test_json_catalogues_align_by_key_path():
    english = {"title": "Lamp", "form": {"name": "Your name", "only_here": "x"}, "n": 3, "l": ["a"]}
    german = {"form": {"name": "Dein Name", "only_there": "y"}, "title": "Lampe", "n": 3}
    files = {
        "app/lamp/translations/en.json": json.dumps(english),
        "app/lamp/translations/de.json": json.dumps(german),
        "app/alone/translations/en.json": json.dumps({"a": "not in German"}),
        "app/deep/er/translations/en.json": "not read: it lies too deep",
        "app/deep/er/translations/de.json": "not read: it lies too deep",
    }
    reader = JsonCatalogues("app/*/translations/{language}.json")
    pairs = [Pair("Lamp", "Lampe"), Pair("Your name", "Dein Name")]
    assert read(reader, files, ("en", "de")) == pairs


def test_gettext_catalogues_align_by_message():
    catalogue = compiled_catalogue(
        {
            "?city:_Open [[of a shop]]order": "Offene _Bestellung",
            "menu\x04Close it": "Schlie\u00dfen",
            "%(n)s day\0%(n)s days": "%(n)s Tag\0%(n)s Tage",
        }
    )
    assert gettext.GNUTranslations(io.BytesIO(catalogue)).gettext("menu\x04Close it")  # a fair fake
    files = {
        "shop/locale/de/LC_MESSAGES/django.mo": catalogue,
        "shop/locale/de_Informal/LC_MESSAGES/django.mo": b"another language",
        "shop/locale/de/LC_MESSAGES/django.po": b"not compiled",
    }
    pattern = "shop/locale/{language}/LC_MESSAGES/*.mo"
    reader = GettextCatalogues(pattern, "_", r"^\?\w+:|\[\[.*?\]\]")
    pairs = read(reader, files, ("en", "de"))
    assert set(pairs) == {
        Pair("", pairs[0].second),  # the header, which the filter "empty" removes
        Pair("Open order", "Offene Bestellung"),
        Pair("Close it", "Schlie\u00dfen"),
        Pair("%(n)s day", "%(n)s Tag"),
    }
    swapped = read(reader, files, ("de", "en"))
    assert [Pair(p.second, p.first) for p in swapped] == pairs
    with pytest.raises(DataPrepError, match="no message catalogues under shop/locale"):
        read(reader, files, ("en", "fr"))


@pytest.mark.parametrize(
    ("marks", "text", "other", "expected"),
    [
        ("_", "_Open", "\u00d6_ffnen", "Open"),
        ("_", "\u00d6_ffnen", "_Open", "\u00d6ffnen"),
        ("_", "Set max_width", "max_width setzen", "Set max_width"),
        ("_", "_Save my_file", "Datei sichern", "_Save my_file"),
        ("_", "%(first_name)s _left", "%(first_name)s ging", "%(first_name)s left"),
        ("&", "Rol&l on", "Rol&l an", "Roll on"),
        ("&", "AT&T & others", "AT&T und andere", "AT&T & others"),
        ("&", "1 &lt; 2", "1 &lt; 2", "1 &lt; 2"),
    ],
)
def test_mnemonics(marks, text, other, expected):
    assert without_mnemonic(text, other, marks) == expected


def test_lines_end_at_line_feeds_alone_and_must_correspond(tmp_path):
    source, paths = TextSource("train", ("a", "b")), (tmp_path / "a", tmp_path / "b")
    paths[0].write_bytes(b"eins\nzwei")
    paths[1].write_bytes("one\r\nt\u2028w\x85o\x1c\r\n".encode())
    assert list(read_pairs(source, paths)) == [
        Pair("eins", "one"),
        Pair("zwei", "t\u2028w\x85o\x1c"),
    ]
    paths[1].write_bytes(b"one\n")
    with pytest.raises(DataPrepError, match="a and b do not correspond"):
        list(read_pairs(source, paths))


# Few words, so that sides often repeat, differ by a number only, or appear on the other side.
SENTENCES = st.lists(
    st.sampled_from(["open", "Open", "door", "T\u00fcr", "1", "2", "{name}", "the", "auf!"]),
    min_size=1,
    max_size=4,
).map(" ".join)
PAIRS = st.lists(st.builds(Pair, SENTENCES, SENTENCES), max_size=60)


LOOSE = Cleaning("plain typography", (Empty(), TooShort(1)), drop_duplicates=True)


def divided(split, pairs, seed=1, domains=None):
    """The pairs of each part."""
    parts = {"train": [], "valid": [], "test": []}
    for part, pair in split.divide(zip(domains or repeat(""), pairs, strict=False), seed):
        parts.setdefault(part, []).append(pair)
    return parts


@given(PAIRS, st.integers(0, 4), st.integers(0, 4), st.integers(0, 5))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_held_out_sentences_occur_nowhere_else(raw, valid, test, seed):
    pairs, _ = cleaned(raw, LOOSE)
    try:
        parts = divided(HeldOut(valid, test), pairs, seed)
    except DataPrepError:
        return
    assert (len(parts["valid"]), len(parts["test"])) == (valid, test)
    assert sorted(parts["train"] + parts["valid"] + parts["test"]) == sorted(pairs)
    sides = [{mask_key(side) for pair in parts[part] for side in pair} for part in parts]
    assert len(set.union(*sides)) == sum(map(len, sides))
    backwards = divided(HeldOut(valid, test), pairs[::-1], seed)
    assert (parts["valid"], parts["test"]) == (backwards["valid"], backwards["test"])


def test_pairs_of_each_domain_are_held_out():
    letters = "abcdefghijklmnopqrst"
    pairs = [Pair(f"{x} one", f"{x} eins") for x in letters]
    # What occurs in another domain too is in no test set.
    pairs += [Pair(f"{x} two", f"{x} zwei") for x in letters] + [Pair("a one", "A two")]
    domains = ["left"] * 20 + ["right"] * 21
    parts = divided(HeldOut(2, 3), pairs, domains=domains)
    assert parts["test"] == parts["test-left"] + parts["test-right"]
    assert (len(parts["test-left"]), len(parts["test-right"]), len(parts["valid"])) == (3, 3, 4)
    assert set(parts["test-left"]) <= set(pairs[:20])
    assert sorted(parts["train"] + parts["valid"] + parts["test"]) == sorted(pairs)
    assert {pairs[0], pairs[20], pairs[40]} <= set(parts["train"])
    with pytest.raises(DataPrepError, match="The domain left has 20 clean pairs, of which 19 can"):
        divided(HeldOut(10, 10), pairs, domains=domains)


def test_overlap_counts_sides_and_pairs():
    train = [Pair("a b", "c d"), Pair("e f", "g 1")]
    held_out = {"valid": [Pair("a b", "g 1"), Pair("x", "y")], "test": [Pair("E F!", "G 2")]}
    found = overlap(held_out, train, ("de", "en"))
    assert found["valid"] == {sense: {"de": 1, "en": 1, "pair": 0} for sense in MATCHES}
    counted = [(0, 0, 0), (1, 0, 0), (1, 1, 1)]  # from the narrowest sense to the widest
    assert [tuple(found["test"][sense].values()) for sense in MATCHES] == counted
