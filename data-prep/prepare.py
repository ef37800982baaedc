"""Command line of the data preparation: `python data-prep/prepare.py quickstart --out DIR`."""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from dataprep import DataPrepError
from dataprep.corpora import CORPORA, TOKENISATIONS, Corpus
from dataprep.pipeline import Options, prepare

from fairseq_gradinit.versions import usable_cores


def build_parser() -> argparse.ArgumentParser:
    """All options, with their defaults; those that depend on the corpus default to None."""
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description="Fetch a parallel corpus and make it ready for fairseq-train. Run again, it\n"
        "resumes where it was interrupted and redoes only what changed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("corpus", choices=sorted(CORPORA), help="which corpus")
    option("--out", type=Path, required=True, metavar="DIR", help="made if need be")
    option("--source-lang", metavar="CODE", help="translate from this language")
    option("--target-lang", metavar="CODE", help="translate into this language")
    option("--tokenisation", choices=TOKENISATIONS, help="the corpus's own")
    option(
        "--vocab-size",
        type=int,
        metavar="N",
        help="pieces in the joint vocabulary, or merge operations of BPE (the corpus's own)",
    )
    option("--seed", type=int, default=1, help="choice of the held-out pairs (1)")
    option("--mirror", metavar="DIR-or-URL", help="take the files from here, by their names")
    option("--cache", type=Path, metavar="DIR", help="keep what is fetched here (OUT/downloads)")
    option(
        "--workers",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="processes; no output depends on it (all cores)",
    )
    return parser


def _languages(
    corpus: Corpus, source: str | None, target: str | None
) -> tuple[tuple[str, str], tuple[str, str]]:
    """The languages of a corpus in its order, and the direction of translation.

    Into English, if nothing else is said; a language that is not named is the other one.

    Raises:
        DataPrepError: what was named is no direction of the corpus.
    """
    if corpus.languages:
        first, second = corpus.languages
        default = corpus.default_source
    elif {source, target} <= {"en", None}:
        raise DataPrepError(
            f"The corpus {corpus.name} has many languages: choose one with --source-lang, into "
            "English, or two with --target-lang as well."
        )
    else:
        first, second = sorted((source or "en", target or "en"))
        default = ""
    other = {first: second, second: first}
    source = source or other.get(target or "", default)
    target = target or other.get(source, "")
    if {source, target} != {first, second} or source == target:
        raise DataPrepError(
            f"The corpus {corpus.name} has the languages {first} and {second}: --source-lang "
            f"{source} --target-lang {target} is not a direction of it."
        )
    return (first, second), (source, target)


def main(arguments: list[str] | None = None) -> int:
    """Run the program with a command line, sys.argv's if None.

    Returns:
        The exit status: 0, 1 after an error that the user can fix (told in one line), or 130
        when interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(message)s", stream=sys.stderr)
    given = sys.argv[1:] if arguments is None else arguments
    parsed = build_parser().parse_args(given)
    corpus = CORPORA[parsed.corpus]
    try:
        languages, direction = _languages(corpus, parsed.source_lang, parsed.target_lang)
        options = Options(
            out=parsed.out,
            languages=languages,
            direction=direction,
            seed=parsed.seed,
            tokenisation=parsed.tokenisation or corpus.tokenisation,
            vocab_size=corpus.vocab_size if parsed.vocab_size is None else parsed.vocab_size,
            mirror=parsed.mirror,
            cache=parsed.cache or parsed.out / "downloads",
            workers=parsed.workers,
            command=shlex.join(["prepare.py", *given]),
        )
        manifest = prepare(corpus, options)
    except (DataPrepError, OSError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command resumes", file=sys.stderr)
        return 130
    logging.info("done: %s", manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
