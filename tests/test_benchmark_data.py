"""The benchmarks of data preparation, on little text and without Perl."""

import json

import data_scale
import moses_agreement
import pytest
from moses_agreement import Scripts, agreeing, kinds, shape

GERMAN = [f"Der Hund Nummer {i} l\u00e4uft \u00fcber die Wiese, usw." for i in range(40)]
ENGLISH = [f"Dog number {i} is running across the meadow, etc." for i in range(40)]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "text").mkdir(parents=True)
    for language, lines in (("de", GERMAN), ("en", ENGLISH)):
        text = "".join(f"{line}\n" for line in lines)
        (folder / f"text/train.{language}").write_text(text, encoding="utf-8")
    return folder


def test_pairs_are_as_long_as_those_of_wmt(corpus):
    pairs = data_scale.pairs_like_wmt([corpus])
    sample = [next(pairs) for _ in range(4000)]
    characters = sum(len(text) for pair in sample for text in pair) / len(sample)
    assert characters == pytest.approx(data_scale.WMT_CHARACTERS, rel=0.05)
    assert all(
        len(german.split("usw.")) == len(english.split("etc.")) for german, english in sample
    )
    again = data_scale.pairs_like_wmt([corpus])
    assert [next(again) for _ in range(4000)] == sample


def test_a_preparation_is_measured(corpus, tmp_path, capsys):
    output = tmp_path / "result.json"
    options = ["--pairs", "100", "--text", str(corpus), "--work", str(tmp_path)]
    assert data_scale.main([*options, "--merges", "20", "--output", str(output)]) == 0
    (outcome,) = json.loads(output.read_text())["results"]["outcomes"]
    assert outcome["pairs"] == 100
    assert set(outcome["steps"]) == {"text", "tokens", "subwords", "data-bin"}
    assert outcome["seconds"] >= sum(outcome["steps"].values())
    assert 10**7 < outcome["peak_bytes"] < 10**10
    assert outcome["disk_bytes"] > outcome["text_bytes"] > 100 * 100
    shown = capsys.readouterr().out
    assert data_scale.main(["--table", "--output", str(output)]) == 0
    assert capsys.readouterr().out == shown
    assert "| 100 | " in shown
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["corpus"]


def test_text_is_needed(capsys):
    with pytest.raises(SystemExit):
        data_scale.main([])
    assert "--text is needed" in capsys.readouterr().err


def perl_in_python(self, script, lines, *options):
    """Stands for the scripts: splits every full stop and comma, and nothing else."""
    if script == "tokenizer.perl":
        return [line.replace(".", " .").replace(",", " ,") for line in lines]
    if script == "detokenizer.perl":
        return [line.replace(" .", ".").replace(" ,", ",") for line in lines]
    return [line.lower() for line in lines] if script == "lowercase.perl" else list(lines)


def test_agreement_with_the_scripts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Scripts, "_run", perl_in_python)
    monkeypatch.setattr(moses_agreement, "perl_version", lambda: "v5")
    text = tmp_path / "text"
    text.write_text("One, two.\nIt's late.\nIt is 3.5 long.\n", encoding="utf-8")
    arguments = ["--moses", str(tmp_path), "--text", "mine", "en", str(text)]
    moses_agreement.main([*arguments, "--results", str(tmp_path)])
    record = json.loads((tmp_path / "moses-agreement.json").read_text())
    iwslt, wmt = record["results"]["agreements"]
    assert (iwslt["lines"], iwslt["tokenised"], wmt["tokenised"]) == (3, 1, 1)
    # Ours makes two tokens of "it's" and one of "3.5"; the first one found comes first.
    assert [kind["example"] for kind in iwslt["kinds"]] == [
        "it's / it &apos;s",
        "3 .5 / 3.5",
    ]
    shown = capsys.readouterr().out
    assert "| mine | en | 3 | IWSLT'14 | 33.33 % |" in shown
    moses_agreement.main(["--table", "--results", str(tmp_path)])
    assert capsys.readouterr().out == shown


def test_lines_agree_if_their_tokens_do():
    assert agreeing(["a  b", "c d "], ["a b", "c e"]) == 1
    assert moses_agreement.percentage(19_999, 20_000) == "99.99 %"
    assert moses_agreement.percentage(20_000, 20_000) == "100 %"


def test_kinds_of_difference_are_counted_by_line():
    perl = ["Hallo Welt etc .", "das usw .", "x 1 y"]
    ours = ["Hallo Welt etc.", "das usw.", "x 22 y"]
    first, second = kinds(perl, ours)
    assert (first.perl, first.ours, first.lines) == ("a .", "a.", 2)
    assert first.example == "etc . / etc."
    assert (second.perl, second.ours, second.lines) == ("0", "0", 1)
    assert shape("Stra\u00dfe 12 \u6f22\u5b57 a b c") == "Aa 0 L a a"
