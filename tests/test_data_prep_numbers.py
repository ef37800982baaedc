"""Numbers in words: spelling, which of them are in which part, and the whole corpus."""

import json
import re
from itertools import combinations

import prepare
import pytest
from dataprep.number_words import choose, english, german

pytestmark = pytest.mark.usefixtures("warm")

# Every word that others are made of, and how they are put together.
SPELT = """
0 null zero; 1 eins one; 2 zwei two; 3 drei three; 4 vier four; 5 fünf five; 6 sechs six;
7 sieben seven; 8 acht eight; 9 neun nine; 10 zehn ten; 11 elf eleven; 12 zwölf twelve;
13 dreizehn thirteen; 14 vierzehn fourteen; 15 fünfzehn fifteen; 16 sechzehn sixteen;
17 siebzehn seventeen; 18 achtzehn eighteen; 19 neunzehn nineteen; 20 zwanzig twenty;
30 dreißig thirty; 40 vierzig forty; 50 fünfzig fifty; 60 sechzig sixty; 70 siebzig seventy;
80 achtzig eighty; 90 neunzig ninety; 21 einundzwanzig twenty-one;
76 sechsundsiebzig seventy-six; 100 einhundert one hundred; 101 einhunderteins one hundred one;
111 einhundertelf one hundred eleven; 121 einhunderteinundzwanzig one hundred twenty-one;
1000 eintausend one thousand; 1001 eintausendeins one thousand one;
1200 eintausendzweihundert one thousand two hundred;
21000 einundzwanzigtausend twenty-one thousand;
101000 einhunderteintausend one hundred one thousand;
201301 zweihunderteintausenddreihunderteins two hundred one thousand three hundred one;
999999 neunhundertneunundneunzigtausendneunhundertneunundneunzig
nine hundred ninety-nine thousand nine hundred ninety-nine
"""


@pytest.mark.parametrize("entry", SPELT.split(";"))
def test_spelling(entry):
    number, first, second = entry.strip().split(maxsplit=2)
    assert (german(int(number)), english(int(number))) == (first, " ".join(second.split()))


@pytest.mark.parametrize("number", [-1, 1_000_000])
@pytest.mark.parametrize("spell", [german, english])
def test_other_numbers_are_refused(spell, number):
    with pytest.raises(ValueError, match=str(number)):
        spell(number)


UNITS = {"ein": 1} | {german(number): number for number in range(20)}
TENS = {german(number): number for number in range(20, 100, 10)}
ENGLISH = {english(number): number for number in (*range(20), *range(20, 100, 10))}


def from_german(word):
    """The number that a word says."""
    if match := re.fullmatch("(.+)tausend(.*)", word):
        return 1000 * from_german(match[1]) + (from_german(match[2]) if match[2] else 0)
    if match := re.fullmatch("(.+)hundert(.*)", word):
        return 100 * UNITS[match[1]] + (from_german(match[2]) if match[2] else 0)
    if match := re.fullmatch(f"(?:(.+)und)?({'|'.join(TENS)})", word):
        return TENS[match[2]] + (UNITS[match[1]] if match[1] else 0)
    return UNITS[word]


def from_english(words):
    """The number that words say."""
    thousands, number = 0, 0
    for word in re.split("[ -]", words):
        if word == "thousand":
            thousands, number = 1000 * number, 0
        elif word == "hundred":
            number *= 100
        else:
            number += ENGLISH[word]
    return thousands + number


def test_every_word_says_its_number():
    for number in (*range(2_000), *range(2_000, 1_000_000, 61)):
        word = german(number)
        assert from_german(word) == number
        assert from_english(english(number)) == number
        # At the end of a word it is "eins", and "ein" before another.
        assert "eins" not in word[:-1]
        assert not word.endswith("ein")


def test_parts():
    parts = choose()
    assert {part: len(set(numbers)) for part, numbers in parts.items()} == {
        "train": 2_000,
        "valid": 50,
        "test": 50,
    }
    for one, other in combinations(parts.values(), 2):
        assert not set(one) & set(other)
    for held_out in ("valid", "test"):
        assert {len(str(number)) for number in parts[held_out]} == {2, 3, 4, 5, 6}
    assert set(range(10)) <= set(parts["train"])
    # Every stretch of the longest ones has some.
    assert {number // 100_000 for number in parts["train"]} == set(range(10))
    assert choose() == parts
    assert parts["train"] != sorted(parts["train"])


def lines_of(path):
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


@pytest.mark.parametrize("tokenisation", ["moses+bpe", "sentencepiece"])
def test_prepared(tmp_path, tokenisation):
    out = tmp_path / "out"
    chosen = [] if tokenisation == "moses+bpe" else ["--tokenisation", tokenisation]
    assert prepare.main(["numbers", "--out", str(out), *chosen]) == 0
    for part, numbers in choose().items():
        assert [from_german(line) for line in lines_of(out / f"text/{part}.de")] == numbers
        assert [from_english(line) for line in lines_of(out / f"text/{part}.en")] == numbers
        assert (out / f"data-bin/{part}.de-en.de.idx").exists()
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["direction"] == ["de", "en"]
    assert manifest["tokenisation"]["name"] == tokenisation
    assert manifest["terms"][0]["licence"] == "MIT"
    assert re.fullmatch("[0-9a-f]{64}", manifest["inputs"][0]["sha256"])
    found = manifest["held_out_sentences_found_elsewhere"]
    assert not any(
        count for senses in found.values() for sense in senses.values() for count in sense.values()
    )
    assert not (out / "downloads").exists()
    pieces = lines_of(out / "subwords/test.de")
    if tokenisation == "moses+bpe":
        assert lines_of(out / "tokens/test.en") == lines_of(out / "text/test.en")
        whole = [line.replace("@@ ", "") for line in pieces]
    else:
        assert not (out / "tokens").exists()
        whole = [line.replace(" ", "").removeprefix("\u2581") for line in pieces]
    assert whole == lines_of(out / "text/test.de")
    assert any(" " in line for line in pieces)


@pytest.mark.parametrize("option", [["--mirror", "folder"], ["--seed", "2"]])
def test_options_without_use(tmp_path, capsys, option):
    assert prepare.main(["numbers", "--out", str(tmp_path / "out"), *option]) == 1
    assert f"{option[0]} has no use for it" in capsys.readouterr().err
    assert not (tmp_path / "out/text").exists()
