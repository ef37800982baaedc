# shellcheck shell=bash
# What the recipes share: their variables, and `recipe "$@"`, which hands all of them to recipe.py.
# A recipe reads its corpus.sh, which reads this file, sets its variables, and calls `recipe "$@"`.

set -euo pipefail
LIB=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
GIVEN=$(compgen -e | tr '\n' ' ')    # names of the variables that the user has set
export GIVEN

recipe() {
    local list python=python3
    for list in MODEL ARM SCHEDULE SUBSETS; do
        local -n words=$list
        local -x "WORDS_$list=${words[*]@Q}"
        unset -n words
    done
    # Outside a virtual environment, the one that make has made.
    command -v fairseq-train >/dev/null || [[ ! -x $LIB/../.venv/bin/python ]] ||
        python=$LIB/../.venv/bin/python
    PYTHONPATH=$LIB/../data-prep${PYTHONPATH:+:$PYTHONPATH} exec "$python" "$LIB/recipe.py" "$0" "$@"
}

set -a  # Python sees all that is set from here on.
: "${RUNS:=${LIB%/*}/runs}"          # checkpoints, logs, translations
: "${DATA:=$RUNS/data}"              # corpora, a folder each
: "${RESULTS:=$RUNS/results.jsonl}"  # a line for each run
: "${MIRROR:=}"                      # folder or address to take the corpus's files from
: "${STEPS:=prepare train average translate score}"
: "${PUBLISHED:=$LIB/published.json}"  # file of published figures, to stand beside our own
: "${EXTRA:=}"                       # more options for fairseq-train, in words
: "${GPUS:=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}"  # of this machine; 0 is the CPU
: "${NODES:=1}"                      # machines with as many GPUs
: "${NODE_RANK:=0}"                  # of this machine; only the first one does more than train
: "${WORKERS:=$((GPUS > 0 ? NODES * GPUS : 1))}"  # processes that train, as many as LAUNCH starts
: "${LAUNCH:=}"                      # what starts several processes, such as launch/torchrun.sh
: "${FP16:=$((GPUS > 0))}"           # train in fp16: 1 or 0
GPUS_PER_NODE=$GPUS
