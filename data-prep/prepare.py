"""Command line of the data preparation: `python data-prep/prepare.py quickstart --out DIR`."""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from dataprep import DataPrepError
from dataprep.corpora import CORPORA, TOKENISATIONS, Corpus
from dataprep.parallel import usable_cores
from dataprep.pipeline import Options, prepare
from dataprep.splitting import HeldOut


def _table() -> str:
    """The corpora and the licences of their texts."""
    lines = []
    for corpus in CORPORA.values():
        lines.append(f"{corpus.name}: {corpus.summary}")
        licences = dict.fromkeys(terms.licence for terms in corpus.origin.terms())
        lines += [f"    {licence}" for licence in licences]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """All options, with their defaults; those that depend on the corpus default to None."""
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description="Fetch a parallel corpus and make it ready for fairseq-train. Run again, it\n"
        "resumes where it was interrupted and redoes only what changed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", choices=sorted(CORPORA), help="which corpus")
    parser.add_argument(
        "--list", action="version", version=_table(), help="list the corpora and leave"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if need be")
    parser.add_argument("--source-lang", metavar="CODE", help="translate from this language")
    parser.add_argument("--target-lang", metavar="CODE", help="translate into this language")
    parser.add_argument(
        "--lang", metavar="CODE", help="the language beside English (libreoffice-help)"
    )
    parser.add_argument("--tokenisation", choices=TOKENISATIONS, help="the corpus's own")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="pieces in the joint vocabulary, or merge operations of BPE (the corpus's own)",
    )
    parser.add_argument("--seed", type=int, help="choice of the held-out pairs (1)")
    parser.add_argument(
        "--mirror", metavar="DIR-or-URL", help="take the files from here instead, by their names"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep what is fetched here (OUT/downloads)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes; no output depends on it (all cores)"
    )
    return parser


def _languages(corpus: Corpus, parsed: argparse.Namespace) -> tuple[str, str]:
    """Those of the corpus, or those that the user chose if it has any two.

    Raises:
        DataPrepError: the options are not for this corpus, or do not say enough.
    """
    if corpus.languages:
        if parsed.lang is not None:
            raise DataPrepError(
                f"The corpus {corpus.name} has the languages {' and '.join(corpus.languages)}: "
                "--lang does not apply to it."
            )
        return corpus.languages
    named = (parsed.source_lang, parsed.target_lang)
    chosen = {code for code in named if code is not None} if parsed.lang is None else {parsed.lang}
    # English is the other one, unless two are named.
    languages = tuple(sorted(chosen | ({"en"} if len(chosen) == 1 else set())))
    if len(languages) != 2:
        raise DataPrepError(
            f"The corpus {corpus.name} has many languages: choose one beside English with --lang, "
            "or any two with --source-lang and --target-lang."
        )
    return languages


def _direction(
    corpus: Corpus, languages: tuple[str, str], source: str | None, target: str | None
) -> tuple[str, str]:
    """Fill in the language that was not named.

    Raises:
        DataPrepError: what was named is no direction of these languages.
    """
    first, second = languages
    other = {first: second, second: first}
    if source is None and target is None:
        # Into English, if there is no better reason.
        source = corpus.default_source or other.get("en", first)
    source = source or other.get(target or "", "")
    target = target or other.get(source, "")
    if {source, target} != set(languages):
        raise DataPrepError(
            f"The corpus {corpus.name} has the languages {' and '.join(languages)}: "
            f"--source-lang {source} --target-lang {target} is not a direction of it."
        )
    return source, target


def _options(corpus: Corpus, parsed: argparse.Namespace, command: str) -> Options:
    """What was typed, and the corpus's own choices where nothing was.

    Raises:
        DataPrepError: the corpus has no use for an option.
    """
    if parsed.seed is not None and not isinstance(corpus.split, HeldOut):
        raise DataPrepError(
            f"The corpus {corpus.name} has its own validation and test sets: --seed does not apply "
            "to it."
        )
    languages = _languages(corpus, parsed)
    source, target = _direction(corpus, languages, parsed.source_lang, parsed.target_lang)
    return Options(
        out=parsed.out,
        languages=languages,
        source=source,
        target=target,
        seed=1 if parsed.seed is None else parsed.seed,
        tokenisation=parsed.tokenisation or corpus.tokenisation,
        vocab_size=corpus.vocab_size if parsed.vocab_size is None else parsed.vocab_size,
        mirror=parsed.mirror,
        cache=parsed.cache or parsed.out / "downloads",
        workers=usable_cores() if parsed.workers is None else parsed.workers,
        command=command,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: the command line without the program's name; sys.argv's if None.

    Returns:
        The exit status: 0, 1 after an error that the user can fix (told in one line), or 130
        when interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(message)s", stream=sys.stderr)
    # It would tell of every attempt with all that went through its hands.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    given = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    parsed = parser.parse_args(given)
    if parsed.workers is not None and parsed.workers < 1:
        parser.error("--workers must be at least 1")
    corpus = CORPORA[parsed.corpus]
    try:
        options = _options(corpus, parsed, command=shlex.join(["prepare.py", *given]))
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
