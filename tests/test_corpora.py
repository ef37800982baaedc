"""Corpora: the plateau of their best unigram model, and the scores of their translations."""

from __future__ import annotations

import math

import pytest
from conftest import write_manifest
from corpora import read_translations, score, unigram_plateau


def test_plateau_by_hand() -> None:
    train = [["a", "a", "a"], []]  # with the ends of sentences: 3 a, 2 </s>
    valid = [["a", "unseen"]]  # a, <unk>, </s>
    # Six entries: <s>, <pad>, </s>, <unk>, a, b. e' = 0.1 / 5 = 0.02, and 0.88 is left for p.
    q = {"a": 0.88 * 0.6 + 0.02, "</s>": 0.88 * 0.4 + 0.02, **dict.fromkeys("1234", 0.02)}
    assert sum(q.values()) == pytest.approx(1.0)
    everywhere = sum(-math.log2(share) for share in q.values())
    right = (-math.log2(q["a"]) - math.log2(q["</s>"]) - math.log2(0.02)) / 3
    expected = 0.88 * right + 0.02 * everywhere
    assert unigram_plateau(train, valid, ["a", "b"]) == pytest.approx(expected)


def test_moses_and_bpe_are_undone_before_scoring(tmp_path) -> None:
    texts = {"text/test.de": 'Sie sagte: "Ja."', "text/test.en": 'She said, "Yes, I\'m well."'}
    texts["tokens/test.en"] = "she said , &quot; yes , i &apos;m well-ish . &quot;"
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    write_manifest(tmp_path, "1", lowercase=True)
    generated = tmp_path / "generate-test.txt"
    generated.write_text("H-0\t-0.5\tshe said , &quot; yes , i &apos;m well . &quot;\n")
    (row,) = rows = read_translations(generated, tmp_path)
    assert row.translation == 'she said, "yes, i\'m well."'
    scores = score(tmp_path, "test", rows, split_compounds=True)
    assert scores.bleu == pytest.approx(100)
    assert "case:lc" in scores.signatures[0]
    # The compound of the reference is three tokens then, and one is missed otherwise.
    assert scores.tokenised_bleu < score(tmp_path, "test", rows, False).tokenised_bleu
