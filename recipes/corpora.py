"""Corpora that data-prep/prepare.py made, and the scores of their translated test sets."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from cases import RunError
from dataprep.moses import detokenise
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from fairseq_gradinit.results import TestScores

LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class Corpus:
    """A folder that data-prep/prepare.py made, a hash of its files, and `unigram_plateau`."""

    folder: Path
    digest: str
    plateau: float

    @property
    def name(self) -> str:
        return str(_manifest(self.folder)["corpus"])

    @classmethod
    def read(cls, folder: Path) -> Corpus:
        outputs = json.dumps(_manifest(folder)["outputs"], sort_keys=True)
        digest = hashlib.sha256(outputs.encode()).hexdigest()
        return cls(folder, digest, _plateau(folder, digest))


@functools.cache
def _plateau(folder: Path, digest: str) -> float:
    """Of the corpus of this digest, once for all its runs: it takes the whole training text."""
    target = _manifest(folder)["direction"][1]
    dictionary = (folder / "data-bin" / f"dict.{target}.txt").read_text(encoding="utf-8")
    train, valid = (
        map(str.split, _lines(folder / "subwords" / f"{part}.{target}"))
        for part in ("train", "valid")
    )
    entries = [line.rpartition(" ")[0] for line in dictionary.splitlines()]
    return unigram_plateau(train, valid, entries)


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


def is_lowercase(corpus: Path) -> bool:
    """Whether the corpus is in lower case, so that case cannot be scored."""
    return bool(_manifest(corpus)["tokenisation"].get("moses", {}).get("lowercase"))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def unigram_plateau(
    train: Iterable[Sequence[str]], valid: Iterable[Sequence[str]], dictionary: Collection[str]
) -> float:
    """The validation loss of the best model that sees neither source nor context.

    Fairseq's loss of predicting q where y is right, with e = LABEL_SMOOTHING, V entries in the
    vocabulary and e' = e / (V - 1), is

        (1 - e - e') * -log2 q(y)  +  e' * sum over all v of -log2 q(v).

    Its mean over the training tokens, with relative frequencies p, is lowest for
    q(v) = (1 - e - e') p(v) + e'. This is the mean of the loss of that q over the validation
    tokens. Each sentence ends with </s>, and what is not in the dictionary is <unk>.
    """
    vocabulary = {"<s>", "<pad>", "</s>", "<unk>", *dictionary}

    def frequencies(sentences: Iterable[Sequence[str]]) -> dict[str, float]:
        tokens = chain.from_iterable([*sentence, "</s>"] for sentence in sentences)
        counts = Counter(token if token in vocabulary else "<unk>" for token in tokens)
        return {token: count / counts.total() for token, count in counts.items()}

    rest = LABEL_SMOOTHING / (len(vocabulary) - 1)
    main = 1 - LABEL_SMOOTHING - rest
    p = frequencies(train)
    bits = {token: -math.log2(main * p.get(token, 0.0) + rest) for token in vocabulary}
    right = math.fsum(share * bits[token] for token, share in frequencies(valid).items())
    # The order of a set differs between processes, and with it the last digit of a plain sum.
    return main * right + rest * math.fsum(bits.values())


class Row(NamedTuple):
    """A sentence of a translated test set: plain text, and the translation as tokens."""

    source: str
    reference: str
    translation: str
    tokens: str


def read_translations(generated: Path, corpus: Path, subset: str = "test") -> list[Row]:
    """The translations in a file of fairseq-generate, in the order of the test set."""
    manifest = _manifest(corpus)
    texts = [_lines(corpus / "text" / f"{subset}.{name}") for name in manifest["direction"]]
    lines = re.findall(r"^H-(\d+)\t[^\t\n]*\t(.*)$", generated.read_text("utf-8"), re.MULTILINE)
    hypotheses = {int(number): hypothesis for number, hypothesis in lines}
    if sorted(hypotheses) != list(range(len(texts[1]))):
        raise RunError(f"{generated} does not hold each of the {len(texts[1])} sentences")
    tokens = [hypotheses[number] for number in range(len(hypotheses))]
    moses = "moses" in manifest["tokenisation"]
    translations = detokenise(tokens, manifest["direction"][1]) if moses else tokens
    return list(map(Row, *texts, translations, tokens))


def score(corpus: Path, subset: str, rows: Sequence[Row], split_compounds: bool) -> TestScores:
    """Scores of translations, one reference for each; case counts if the corpus has it.

    With `split_compounds` words are cut at their hyphens, on both sides, before BLEU of tokens is
    computed, as Vaswani et al. (2017) score English-German.
    """
    manifest, lowercase = _manifest(corpus), is_lowercase(corpus)
    references, hypotheses = [r.reference for r in rows], [r.translation for r in rows]
    metrics: list[BLEU | CHRF] = [BLEU(lowercase=lowercase), CHRF(lowercase=lowercase)]
    bleu, chrf = (metric.corpus_score(hypotheses, [references]).score for metric in metrics)
    tokenised = None
    if "moses" in manifest["tokenisation"]:
        # What Moses' multi-bleu.perl gives, and papers from before sacrebleu report.
        references = _lines(corpus / "tokens" / f"{subset}.{manifest['direction'][1]}")
        hypotheses = [row.tokens for row in rows]
        if split_compounds:
            references, hypotheses = map(_without_compounds, (references, hypotheses))
        metrics.append(BLEU(tokenize="none", smooth_method="none", force=True))
        tokenised = metrics[-1].corpus_score(hypotheses, [references]).score
    signatures = tuple(str(metric.get_signature()) for metric in metrics)
    return TestScores(subset, bleu, tokenised, chrf, signatures)


def _without_compounds(lines: Iterable[str]) -> list[str]:
    """The Moses tokeniser's -a has done some of it: "@-@" stands for those hyphens."""
    return [
        re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", line.replace(" @-@ ", "-")) for line in lines
    ]
