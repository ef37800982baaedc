"""Every kind of fairseq's tasks: GradInit leaves the data alone, and all programs read the
checkpoints; the plugin loaded and not used changes no number.
"""

from __future__ import annotations

import re
from pathlib import Path

import checkpoints
import pytest
from conftest import GRADINIT, PLUGIN, Training, run_here, train_here
from test_train import assert_scaled, same

from fairseq_gradinit.plugin.safe_loading import read_checkpoint


def sizes(*sides: str) -> list[str]:
    numbers = {"layers": 1, "embed-dim": 16, "ffn-embed-dim": 32, "attention-heads": 2}
    return [f"--{side}-{name}={number}" for side in sides for name, number in numbers.items()]


BOTH = sizes("encoder", "decoder")
SMOOTHED = ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"]
PAIRS = ["--lang-pairs", "de-en,en-de"]
TRANSFORMER = ["--arch", "transformer_iwslt_de_en", *BOTH, *SMOOTHED]
SAMPLED = ["translation_multi_simple_epoch", "--langs", "de,en", *PAIRS, "--encoder-langtok", "tgt"]
SHARED = [*TRANSFORMER, "--enable-reservsed-directions-shared-datasets", "--sampling-method"]
BLOCKS = ["--tokens-per-sample", "16"]
LSTM = ["--arch", "lstm", "--encoder-hidden-size", "32", "--criterion", "cross_entropy"]
# What --task is, for training and evaluation; what training has beside it.
TASKS = {
    "lstm": (["translation"], LSTM),
    "several pairs": (SAMPLED, [*SHARED, "temperature"]),
    "multilingual": (
        ["multilingual_translation", *PAIRS],
        ["--arch", "multilingual_transformer_iwslt_de_en", *BOTH, *SMOOTHED],
    ),
    "levenshtein": (
        ["translation_lev", "--noise", "random_delete"],
        ["--arch", "levenshtein_transformer", "--criterion", "nat_loss", *BOTH],
    ),
    "language model": (
        ["language_modeling", *BLOCKS],
        ["--arch", "transformer_lm", "--criterion", "cross_entropy", *sizes("decoder")],
    ),
    "masked language model": (
        ["masked_lm", *BLOCKS],
        ["--arch", "roberta_base", "--criterion", "masked_lm", *sizes("encoder")],
    ),
    "denoising": (
        ["denoising", *BLOCKS, "--mask", "0.3"],
        ["--arch", "bart_base", "--criterion", "cross_entropy", *BOTH],
    ),
}
USUAL = [
    *("--optimizer", "adam", "--lr", "1e-3", "--lr-scheduler", "inverse_sqrt"),
    *("--warmup-updates", "50", "--clip-norm", "1", "--dropout", "0.1", "--max-tokens", "400"),
    *("--num-workers", "0", "--disable-validation", "--cpu", "--max-update", "4"),
    # Without the thread that reads ahead, which at times aborts a process that is done.
    *("--data-buffer-size", "0"),
    *("--log-format", "simple", "--log-interval", "1"),
]


def test_the_hooks_change_no_number(corpus, tmp_path, monkeypatch):
    from fairseq import options, tasks
    from fairseq.distributed import utils
    from fairseq.trainer import Trainer

    hooked = train_here(corpus.translation, tmp_path, "--no-save")
    for holder, name in (
        (options, "add_optimization_args"),
        (tasks, "setup_task"),
        (utils, "call_main"),
        (Trainer, "begin_epoch"),
    ):
        monkeypatch.setattr(holder, name, getattr(holder, name).__wrapped__)
    stock = train_here(corpus.translation, tmp_path, "--no-save")
    assert len(set(stock.updates)) == len(stock.batches) == 4
    assert (hooked.updates, hooked.batches) == (stock.updates, stock.batches)
    assert same(hooked.weights, stock.weights)


def evaluate(name: str, data: Path, checkpoint: Path) -> None:
    """With a program of fairseq's, which must print something sensible."""
    program, words = "fairseq-generate", ["-s", "de", "-t", "en", "--gen-subset", "valid"]
    if name == "language model":
        program, words = "fairseq-eval-lm", ["--gen-subset", "valid"]
    elif BLOCKS[0] in TASKS[name][0]:
        program, words = "fairseq-validate", []
    words += ["--task", *TASKS[name][0], "--path", checkpoint, "--cpu", "--max-tokens", "400"]
    done = run_here(program, data, *PLUGIN, *words)
    assert done.code == 0, done.output[-2000:]
    if program == "fairseq-generate":
        assert len(re.findall(r"^H-\d+\t", done.output, re.MULTILINE)) == 40
    else:
        pattern = r"Perplexity: (\S+)" if "eval" in program else r"\| valid \| .*\| ppl (\S+)"
        (perplexity,) = re.findall(pattern, done.output)
        assert 8.0 < float(perplexity) < 500.0


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_task_from_gradinit_to_the_evaluation_of_averages(corpus, tmp_path, name):
    task, training = TASKS[name]
    data = corpus.language_model if BLOCKS[0] in task else corpus.translation

    def train_task(*options: str) -> Training:
        words = ["--task", *task, *training, *options]
        run = train_here(data, tmp_path, *words, base=USUAL)
        assert run.code == 0, run.output
        return run

    without = train_task("--no-save")
    saving = [*GRADINIT, "--save-interval-updates", "2"]
    run = train_task(*saving)
    assert run.batches == without.batches
    assert len(run.lines("| gradinit: ")) == 3
    assert_scaled(run, tmp_path)
    assert len(train_task(*saving, "--max-update", "6").updates) == 2
    options = read_checkpoint(tmp_path / "checkpoint_last.pt")["cfg"]["task"]
    options = options if isinstance(options, dict) else vars(options)
    assert (options["gradinit"], options["gradinit_iterations"]) == (True, 3)
    average = tmp_path / "average.pt"
    words = ["average", str(tmp_path), "--last", "2", "--output", str(average)]
    assert checkpoints.main(words) == 0
    evaluate(name, data, average)
