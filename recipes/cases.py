"""Cases: all that determines a training run and the use of its model, as data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results import Circumstances, Settings, current_circumstances
from fairseq_gradinit.storage import parse, write_atomically

ROOT = Path(__file__).resolve().parent.parent

# Options that a record keeps elsewhere, or that do not decide what is trained or translated.
ELSEWHERE = {
    *("--seed", "--save-dir", "--lr", "--warmup-updates", "--max-update", "--optimizer"),
    *("--max-tokens", "--update-freq", "--distributed-world-size"),
    *("--log-format", "--log-interval", "--data-buffer-size"),
}


class RunError(GradInitError):
    """What went wrong with a run, where, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run that can be carried out, by `runner.Run`.

    Attributes:
        recipe, title, model: see `fairseq_gradinit.results.records`.
        corpus: the folder that data-prep/prepare.py makes.
        pieces: of words, as fairseq's --remove-bpe calls them.
        options: for fairseq-train, all but the data, the seed and the folder.
        tokens_per_batch: max-tokens times update-freq times workers.
        average: how many of the last checkpoints are averaged; with 0 the last one is translated.
        decoding: options for fairseq-generate that decide the translations.
        subsets: parts of the corpus that are translated and scored.
        split_compounds: see `corpora.score`.
        baseline: the recipe to compare with.
        scales_of: the run whose learned scales are applied; of it, only the scales are learned.
    """

    recipe: str
    title: str
    model: str
    corpus: str
    source: str
    target: str
    pieces: str
    options: tuple[str, ...]
    tokens_per_batch: int
    seed: int = 1
    workers: int = 1
    average: int = 0
    decoding: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ("test",)
    split_compounds: bool = False
    baseline: str | None = None
    scales_of: Case | None = None

    @property
    def settings(self) -> Settings:
        """As records have them."""
        pairs = _pairs(self.options)
        values = dict(pairs)
        momentum = f"momentum {values.get('--momentum', '0')}"
        used = [*pairs, *([("--average", f"{self.average}")] if self.average else [])]
        if self.subsets:
            used += _pairs(self.decoding)
        if self.scales_of:
            used.append(("--gradinit-scales", f"of {self.scales_of.label}"))
        return Settings(
            model=self.model,
            optimizer=values["--optimizer"],
            optimizer_settings=values.get("--adam-betas", momentum),
            lr=float(values["--lr"]),
            warmup=int(values["--warmup-updates"]),
            updates=int(values["--max-update"]),
            tokens_per_batch=self.tokens_per_batch,
            options=tuple(f"{n} {v}".strip() for n, v in used if n not in ELSEWHERE),
        )

    @property
    def label(self) -> str:
        found = self.settings
        schedule = f"lr {found.lr:g} warmup {found.warmup}"
        how = f"{found.optimizer} {found.optimizer_settings}"
        return f"{self.recipe} {self.model} {schedule} {how} seed {self.seed}"


def _pairs(words: Iterable[str]) -> list[tuple[str, str]]:
    """Options with their values, which are empty for flags."""
    pairs: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("--"):
            pairs.append((word, ""))
        else:
            name, value = pairs[-1]
            pairs[-1] = name, f"{value} {word}".strip()
    return pairs


@dataclass(frozen=True)
class Begun:
    """A run as it was begun, in RUN/run.json."""

    case: Case
    circumstances: Circumstances

    @classmethod
    def read(cls, run: Path) -> Begun:
        return parse(cls, json.loads((run / "run.json").read_text(encoding="utf-8")))


def begin(run: Path, case: Case) -> None:
    """Write down what is going to be run; the circumstances stay those of the start of training."""
    if (run / "run.json").exists():
        begun = replace(Begun.read(run), case=case)
    else:
        begun = Begun(case, current_circumstances(ROOT, workers=case.workers))
    write_atomically(run / "run.json", json.dumps(asdict(begun), indent=1) + "\n")
