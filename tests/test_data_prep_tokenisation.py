"""Moses's tokenisation and BPE for data preparation. What Perl prints was observed, not derived."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from dataprep import DataPrepError
from dataprep.bpe import encode_lines, learn_codes
from dataprep.moses import Moses, detokenise, tokenise
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from subword_nmt.learn_bpe import learn_bpe

PLAIN = Moses()
LOWERCASE = Moses(lowercase=True)
HYPHENS = Moses(aggressive_hyphens=True)
PUNCTUATION = Moses(normalise_punctuation=True)
WMT = Moses(aggressive_hyphens=True, normalise_punctuation=True)
SETTINGS = [PLAIN, LOWERCASE, HYPHENS, PUNCTUATION, WMT]

# On a busy machine too.
unhurried = hypothesis_settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)

CORPUS = [
    "der kleine hund läuft über die straße , und der große hund läuft ihm nach .",
    "the small dog runs across the street , and the large dog runs after it .",
    "&quot; wir laufen &quot; , sagte sie , &quot; aber nicht mit dem hund &quot; .",
] * 3
MERGES = 40


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "codes"
    learn_codes(CORPUS, MERGES, path)
    return path


@pytest.mark.parametrize(
    ("language", "moses", "line", "perl"),
    [
        ("en", PLAIN, "Dr. Smith paid 1,000.50 dollars.", "Dr. Smith paid 1,000.50 dollars ."),
        ("en", PLAIN, "It's Tom's, isn't it?", "It &apos;s Tom &apos;s , isn &apos;t it ?"),
        ("en", PLAIN, "The U.S. in 1990, etc.", "The U.S. in 1990 , etc ."),
        ("en", PLAIN, "A,B and 5,300 in No. 5, No. Why", "A , B and 5,300 in No. 5 , No . Why"),
        ("en", PLAIN, "Wait... (no) [sic]!", "Wait ... ( no ) &#91; sic &#93; !"),
        ("en", PLAIN, '"A < B", x|y.', "&quot; A &lt; B &quot; , x &#124; y ."),
        ("en", PLAIN, "See http://a.org/b?c=d&e", "See http : / / a.org / b ? c = d &amp; e"),
        ("en", HYPHENS, "mother-in-law, x - y", "mother @-@ in @-@ law , x - y"),
        ("de", PLAIN, "Das kostet z.B. 1.000,50 Euro.", "Das kostet z.B. 1.000,50 Euro ."),
        ("de", PLAIN, "Dr. Weiß am 3. Mai usw.", "Dr. Weiß am 3. Mai usw ."),
        ("de", PLAIN, "Er ging. Sie kam. bald", "Er ging . Sie kam. bald"),
        ("de", PLAIN, "Wie geht's, „Ärzte“?", "Wie geht &apos; s , „ Ärzte “ ?"),
        ("de", LOWERCASE, "Dr. No, ÄRZTE UND ÖFEN", "dr. no , ärzte und öfen"),
        ("de", PUNCTUATION, "Er sagte: „Ja.“", "Er sagte : &quot; Ja &quot; ."),
        ("de", PUNCTUATION, "„Nein“, ( so ) .", "&quot; Nein &quot; , ( so ) ."),
        ("de", PUNCTUATION, "«gut» … 5\u00a0000", "&quot; gut &quot; ... 5,000"),
        ("de", PUNCTUATION, "50\u00a0% \u2013 \u20145", "50 % - - 5"),
        ("de", WMT, "Nord-Süd-„Gefälle“", "Nord @-@ Süd- &quot; Gefälle &quot;"),
        ("en", PUNCTUATION, "“Yes”, it\u2019s 10 %", "&quot; Yes , &quot; it &apos;s 10 %"),
        ("en", PUNCTUATION, "Ko\u00adpie\u200bx", "Ko pie x"),
        ("en", LOWERCASE, "ΟΔΟΣ", "οδοσ"),
        ("en", PLAIN, "a\u00a0b\u2028c\u0085d\u3000e", "a b c d e"),
        ("en", PLAIN, "a\x01b\x1cc\td", "abc d"),
    ],
)
def test_a_line_is_tokenised_as_by_perl(language, moses, line, perl) -> None:
    assert tokenise([line], language, moses) == [perl]


@pytest.mark.parametrize(
    ("language", "tokens", "perl"),
    [
        ("en", "It &apos;s Tom &apos;s part @-@ time job .", "It's Tom's part-time job."),
        ("de", "&quot; Ja &quot; , ( so ) &#91; sic &#93; !", '"Ja", (so) [sic]!'),
        ("de", "Er ging . Sie kam .", "Er ging. Sie kam."),
    ],
)
def test_tokens_are_joined_as_by_perl(language, tokens, perl) -> None:
    assert detokenise([tokens], language) == [perl]


anything = st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=5)
languages = st.sampled_from(["de", "en"])
settings = st.sampled_from(SETTINGS)


def test_codes_are_those_of_subword_nmt_in_whichever_order_lines_come(codes, tmp_path) -> None:
    theirs = io.StringIO()
    learn_bpe(io.StringIO("\n".join(CORPUS)), theirs, MERGES)
    assert codes.read_text(encoding="utf-8") == theirs.getvalue()
    learn_codes(sorted(CORPUS), MERGES, tmp_path / "codes")
    assert (tmp_path / "codes").read_bytes() == codes.read_bytes()


def test_nothing_is_printed(tmp_path, capfd) -> None:
    learn_codes(CORPUS, MERGES, tmp_path / "codes")
    with pytest.raises(DataPrepError, match=r"Only \d+ merges can be learnt"):
        learn_codes(CORPUS, 10_000, tmp_path / "codes")
    assert capfd.readouterr() == ("", "")


def test_known_words_stay_whole_and_others_are_cut(codes) -> None:
    assert encode_lines(codes, ["der hund", "hunderte"]) == ["der hund", "h@@ un@@ d@@ e@@ r@@ te"]


@unhurried
@given(anything, languages, settings)
def test_every_line_gives_a_line_of_tokens_and_one_of_pieces(codes, lines, language, moses) -> None:
    tokenised = tokenise(lines, language, moses)
    assert len(tokenised) == len(lines)
    assert all(line == " ".join(line.split()) for line in tokenised)
    joined = [f"{line} ".replace("@@ ", "").rstrip() for line in encode_lines(codes, tokenised)]
    assert joined == tokenised
