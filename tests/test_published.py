"""The published figures that recipes show beside their own."""

from __future__ import annotations

from conftest import ROOT
from dataprep.corpora import CORPORA

from fairseq_gradinit.plugin.schemes.options import SCHEMES
from fairseq_gradinit.results.tables import read_published

FOLDER = ROOT / "recipes"


def test_published_figures_are_of_recipes_that_exist_on_their_corpus() -> None:
    """`read_published` itself refuses a figure without a link to where it stands."""
    figures = read_published(FOLDER / "published.json")
    assert len(set(figures)) == len(figures) > 0
    for figure in figures:
        folder, arm = figure.recipe.split("/")
        scripts = {path.stem for path in (FOLDER / folder).glob("*.sh")} - {"corpus", "scheme"}
        assert arm in scripts | set(SCHEMES), figure
        assert figure.corpus in CORPORA, figure
        assert figure.corpus.split("-")[0] == folder.split("_")[0], figure
