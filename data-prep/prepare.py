"""Command line of the data preparation: `python data-prep/prepare.py quickstart --out DIR`."""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from dataprep import DataPrepError
from dataprep.corpora import CORPORA, Corpus
from dataprep.pipeline import Options, prepare


class _ListCorpora(argparse.Action):
    """Print the table of corpora and leave."""

    def __call__(self, parser, namespace, values, option_string=None):
        for corpus in CORPORA.values():
            print(f"{corpus.name}: {corpus.summary}")
            for wheel in corpus.wheels:
                print(f"    {wheel.project} {wheel.version}, {wheel.licence}")
            if corpus.published is not None:
                print(f"    {corpus.published.licence}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """All options, with their defaults; those that depend on the corpus default to None."""
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description="Fetch a parallel corpus and make it ready for fairseq-train. Run again, it "
        "goes on where it was interrupted and redoes only what changed.",
    )
    parser.add_argument("corpus", choices=sorted(CORPORA), help="which corpus")
    parser.add_argument("--list", action=_ListCorpora, nargs=0, help="list the corpora and leave")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if need be")
    parser.add_argument("--source-lang", metavar="CODE", help="translate from this language")
    parser.add_argument("--target-lang", metavar="CODE", help="translate into this language")
    parser.add_argument("--seed", type=int, help="choice of the held-out pairs (1)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="joint subword vocabulary")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="take the wheels from here, fetch nothing"
    )
    parser.add_argument(
        "--mirror", metavar="DIR-or-URL", help="take the published files from here instead"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep what is fetched here (OUT/wheels or OUT/downloads)",
    )
    return parser


def _direction(corpus: Corpus, source: str | None, target: str | None) -> tuple[str, str]:
    """Fill in the language that was not named."""
    first, second = corpus.languages
    other = {first: second, second: first}
    if source is None:
        source = corpus.default_source if target is None else other.get(target, target)
    if target is None:
        target = other.get(source, source)
    return source, target


def _check_options(corpus: Corpus, parsed: argparse.Namespace) -> None:
    """Refuse options that this corpus has no use for."""
    useless = ("mirror",) if corpus.published is None else ("wheels", "seed")
    for name in useless:
        if getattr(parsed, name) is not None:
            kind = "comes out of wheels" if corpus.published is None else "is used as published"
            raise DataPrepError(f"The corpus {corpus.name} {kind}: --{name} has no use for it.")


def _options(corpus: Corpus, parsed: argparse.Namespace, command: str) -> Options:
    """What was typed, and the corpus's own choices where nothing was."""
    source, target = _direction(corpus, parsed.source_lang, parsed.target_lang)
    kept_in = "wheels" if corpus.published is None else "downloads"
    return Options(
        out=parsed.out,
        source=source,
        target=target,
        seed=1 if parsed.seed is None else parsed.seed,
        vocab_size=corpus.vocab_size if parsed.vocab_size is None else parsed.vocab_size,
        wheels=parsed.wheels,
        mirror=parsed.mirror,
        cache=parsed.cache or parsed.out / kept_in,
        command=command,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: the command line without the program's name; sys.argv's if None.

    Returns:
        The exit status: 0, 1 after a fault that the user can mend (told in one line), or 130
        when interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(message)s", stream=sys.stderr)
    given = sys.argv[1:] if arguments is None else arguments
    parsed = build_parser().parse_args(given)
    corpus = CORPORA[parsed.corpus]
    try:
        _check_options(corpus, parsed)
        options = _options(corpus, parsed, command=shlex.join(["prepare.py", *given]))
        manifest = prepare(corpus, options)
    except (DataPrepError, OSError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    logging.info("done: %s", manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
