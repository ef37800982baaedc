"""What a recipe does with its variables: `recipe "$@"` in lib.sh calls it.

For each seed it prepares the corpus, trains, averages checkpoints, translates and scores, see
`runner`. Everything lies in RUNS; the scores are lines of RESULTS.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from cases import Case, RunError
from programs import environment, shown
from runner import ALL_SENTENCES, NO_READING_THREAD, PLUGIN, STEPS, Run, prepare

from fairseq_gradinit.errors import GradInitError

HERE = Path(__file__).resolve().parent
ALL_STEPS = ("prepare", *STEPS)
VARIABLE = re.compile(r'^: "\$\{([A-Z0-9_]+):=.*\}" *(.*)$', re.MULTILINE)

# What has a variable, which tables and other steps read, is not to be set behind their backs.
VARIABLES = {
    **{"--lr": "LR", "--warmup-updates": "WARMUP", "--max-update": "UPDATES", "--seed": "SEEDS"},
    **{"--max-tokens": "MAX_TOKENS", "--update-freq": "BATCH_TOKENS", "--save-dir": "RUNS"},
}


class Variables(dict[str, str]):
    """Those of a recipe."""

    def number(self, name: str) -> int:
        try:
            return int(self[name])
        except ValueError:
            raise RunError(f"{name}={self[name]} is no whole number") from None

    def words(self, name: str) -> list[str]:
        """Of an array in a recipe."""
        return shlex.split(self[f"WORDS_{name}"])


def split_batch(known: Variables) -> int:
    """The update-freq that makes an update of BATCH_TOKENS; sets MAX_TOKENS where it is not."""
    batch, workers = known.number("BATCH_TOKENS"), known.number("WORKERS")
    here = known.number("GPUS") or 1
    if not known["LAUNCH"] and workers > here:
        raise RunError(
            f"WORKERS={workers}, and without LAUNCH {here} can be started: LAUNCH=launch/gloo.sh "
            "starts more on CPUs, launch/torchrun.sh or launch/srun.sh on several machines"
        )
    if not known["MAX_TOKENS"]:
        known["MAX_TOKENS"] = str(share(batch // workers, known.number("MOST_TOKENS")))
    frequency, rest = divmod(batch, workers * known.number("MAX_TOKENS"))
    if rest:
        raise RunError(
            f"BATCH_TOKENS={batch} is no multiple of MAX_TOKENS={known['MAX_TOKENS']} times the "
            f"{workers} processes that train: choose another of these"
        )
    return frequency


def share(each: int, most: int) -> int:
    """What a process takes at a time of the tokens it has in an update: `most` if it can be."""
    sizes = range(min(each, most), most // 2, -1)
    return next((size for size in sizes if each % size == 0), min(each, most))


def shrink(known: Variables) -> None:
    """A tiny corpus, model and length, in a folder of its own."""
    runs = f"{known['RUNS']}/smoke"
    # With update-freq where the recipe has it.
    tokens = 500 * known.number("WORKERS") * min(2, split_batch(known))
    known |= {
        **{"RUNS": runs, "DATA": f"{runs}/data", "RESULTS": f"{runs}/results.jsonl"},
        **{"CORPUS": "numbers", "PIECES": "subword_nmt", "MIRROR": "", "SEEDS": "1"},
        **{"WORDS_SUBSETS": "test", "BATCH_TOKENS": f"{tokens}", "MAX_TOKENS": "500"},
        **{"UPDATES": "12", "WARMUP": f"{min(4, known.number('WARMUP'))}"},
        **{"SAVE_EVERY": "4", "AVERAGE": "2", "BEAM": "2"},
    }
    if known["SOURCE"] == "en":
        known["TARGET"] = "de"
    for side in ("encoder", "decoder"):
        sizes = {"layers": 1, "embed-dim": 32, "ffn-embed-dim": 64, "attention-heads": 2}
        known["WORDS_MODEL"] += "".join(f" --{side}-{n} {size}" for n, size in sizes.items())
    if "--gradinit" in known.words("ARM"):
        known["WORDS_ARM"] += " --gradinit-iterations 2"


def training_options(known: Variables) -> list[str]:
    """All that decides what is trained, except for the corpus's bytes and the seed."""
    extra = known["EXTRA"].split()
    for name in (word.partition("=")[0] for word in extra):
        if name in VARIABLES:
            raise RunError(f"EXTRA has {name}: set {VARIABLES[name]} instead")
    frequency, updates = split_batch(known), known.number("UPDATES")
    options = [
        *(*PLUGIN, "--task", "translation"),
        *("--source-lang", known["SOURCE"], "--target-lang", known["TARGET"]),
        *(*known.words("MODEL"), *known.words("ARM")),
        *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
        *("--lr", known["LR"], "--warmup-updates", known["WARMUP"], *known.words("SCHEDULE")),
        *("--total-num-update", f"{updates}", "--max-update", f"{updates}"),
        *("--max-tokens", known["MAX_TOKENS"], "--update-freq", f"{frequency}"),
        *(*ALL_SENTENCES, *NO_READING_THREAD),
        *("--save-interval-updates", known["SAVE_EVERY"]),
        *("--keep-interval-updates", known["AVERAGE"], "--no-epoch-checkpoints"),
        *("--save-interval", "1000000", "--validate-interval", "1000000"),
        *("--log-format", "json", "--log-interval", f"{max(1, updates // 75)}"),
    ]
    if known.number("FP16"):
        options.append("--fp16")
    if known.number("GPUS") and not known["LAUNCH"]:
        options += ["--distributed-world-size", known["WORKERS"]]
    return [*options, *extra]


def cases(known: Variables, script: Path) -> Iterator[tuple[Case, Path]]:
    """The runs of a recipe, one for each seed, and their folders."""
    folder = script.parent.absolute().name
    # One script for many initialisations, each of which is an arm.
    arm = known["SCHEME"] if script.stem == "scheme" else script.stem
    options = training_options(known)
    batch = known["BATCH_TOKENS"]
    # As many tokens on more processes are the same options, and another batch.
    digest = hashlib.sha256(shlex.join([*options, batch]).encode()).hexdigest()
    for seed in known["SEEDS"].split():
        case = Case(
            recipe=f"{folder}/{arm}",
            title=known["TITLE"],
            model=known["MODEL_NAME"],
            corpus=str(Path(known["DATA"], known["CORPUS"]).absolute()),
            source=known["SOURCE"],
            target=known["TARGET"],
            pieces=known["PIECES"],
            options=tuple(options),
            tokens_per_batch=int(batch),
            seed=int(seed),
            workers=known.number("WORKERS"),
            average=known.number("AVERAGE"),
            decoding=(
                *("--beam", known["BEAM"], "--lenpen", known["LENPEN"]),
                *("--max-len-a", known["MAX_LEN_A"], "--max-len-b", known["MAX_LEN_B"]),
                *("--max-tokens", "8000"),
            ),
            subsets=tuple(known.words("SUBSETS")),
            split_compounds=bool(known["COMPOUNDS"]),
            baseline=f"{folder}/default-warmup",
        )
        name = f"lr-{known['LR']}-{digest[:8]}"
        yield case, Path(known["RUNS"], case.recipe, name, f"seed-{seed}").absolute()


def usage(known: Variables, script: Path) -> str:
    """What the recipe does, and its variables."""
    heading = script.read_text().splitlines()[1].removeprefix("# ")
    command = f"    [VARIABLE=value ...] bash {script} [--dry-run] [--smoke]"
    lines = [heading, "", command, "", "Variables, and what they are now:"]
    for name, meaning in variables(script).items():
        if name in os.environ:
            lines.append(f"  {name + '=' + known[name]:<24} {meaning}".rstrip())
    return "\n".join(lines)


def variables(script: Path) -> dict[str, str]:
    """The variables of a recipe and what they mean."""
    shared = (script.parent / "corpus.sh", HERE / "small_corpus.sh", HERE / "lib.sh")
    return dict(chain(*(VARIABLE.findall(path.read_text()) for path in (script, *shared))))


def again(known: Variables, script: Path, seed: int, smoke: bool) -> str:
    """The command that scores a run: this recipe, with the variables that it was given."""
    given = {name: os.environ[name] for name in variables(script) if name in known["GIVEN"].split()}
    given |= {"SEEDS": str(seed), "STEPS": "score"}
    words = ["env", *(f"{n}={v}" for n, v in given.items()), "bash", str(script)]
    return shown([*words, *(["--smoke"] if smoke else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(add_help=False, usage="bash SCRIPT [OPTION...]")
    parser.add_argument("script", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--smoke", action="store_true", help="try them on a tiny corpus")
    parser.add_argument("--help", "-h", action="store_true", help="list the variables")
    options = parser.parse_args(arguments)
    known = Variables(os.environ)
    try:
        if options.help:
            print(usage(known, options.script))
        else:
            run_recipe(known, options)
    except (GradInitError, OSError) as error:
        print(f"{options.script.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{options.script.name}: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


def run_recipe(known: Variables, options: argparse.Namespace) -> None:
    """Carry out, or print, what a recipe asks for."""
    script, steps = options.script, known["STEPS"].split()
    for name in steps:
        if name not in ALL_STEPS:
            raise RunError(f"STEPS has {name}, which is none of: {' '.join(ALL_STEPS)}")
    if options.smoke:
        shrink(known)
    found, node = list(cases(known, script)), known.number("NODE_RANK")
    if "prepare" in steps and node == 0:
        prepare(found[0][0], known["CORPUS"], known["MIRROR"], options.dry_run)
    launch = ("bash", str(HERE / known["LAUNCH"])) if known["LAUNCH"] else ()
    for case, folder in found:
        print(f"\n# == {case.recipe}, seed {case.seed}", flush=True)
        run = Run(case, folder, node=node, launch=launch)
        if not options.dry_run:
            run.carry_out(steps, Path(known["RESULTS"]).absolute())
            continue
        run.show(steps)
        if "score" in steps:
            print(again(known, script, case.seed, options.smoke))
    if "score" in steps and node == 0 and not options.dry_run:
        table = ["fairseq-gradinit", "table", known["RESULTS"], "--published", known["PUBLISHED"]]
        subprocess.run(table, env=environment(), check=False)


if __name__ == "__main__":
    sys.exit(main())
