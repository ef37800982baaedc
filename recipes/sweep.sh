#!/usr/bin/env bash
# Recipes over learning rates, beta2 and seeds: a table and heat maps of where they train.
#
#     [VARIABLE=value ...] bash recipes/sweep.sh [--dry-run] [--smoke]
#     sbatch --array=0-N [...] recipes/sweep.sh        (N: see --count, less one)
#     bash recipes/sweep.sh --count
#
# Runs that are finished are not run again; one that diverges is a result. What the recipes take
# (UPDATES, WARMUP, DATA, ...) can be set for the sweep too. The stability figure of the GradInit
# paper is: RECIPES="iwslt14_de_en/default-no-warmup iwslt14_de_en/gradinit-adam" bash sweep.sh
# Other initialisations have their names: RECIPES="multi30k/admin multi30k/t-fixup" bash sweep.sh
set -euo pipefail

: "${RECIPES:=multi30k/default-no-warmup multi30k/gradinit-adam}"
: "${LRS:=5e-4 1e-3 2e-3 4e-3 8e-3}"    # peak learning rates
: "${BETA2S:=0.9 0.95 0.98 0.999}"      # of Adam
: "${SEEDS:=1}"
: "${JOBS:=1}"                          # runs at a time, each on one GPU, if there are any

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Slurm runs a copy of this file from elsewhere.
[[ -e $HERE/lib.sh ]] || HERE=$SLURM_SUBMIT_DIR/recipes
export RUNS=${RUNS:-${HERE%/*}/runs/sweep}

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; }

points() {
    local seed recipe beta2s beta2 lr
    for seed in $SEEDS; do
        for recipe in $RECIPES; do
            beta2s=$BETA2S
            [[ $recipe != *-sgd ]] || beta2s=none
            for beta2 in $beta2s; do
                for lr in $LRS; do
                    echo "$seed $recipe $beta2 $lr"
                done
            done
        done
    done
}

# point SEED RECIPE BETA2 LR: one run.
point() {
    local gpus devices script=$HERE/$2.sh
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    if [[ -n ${SLOT:-} ]] && ((gpus > 0)); then
        IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
        export CUDA_VISIBLE_DEVICES=${devices[SLOT % ${#devices[@]}]} GPUS=1
    fi
    if [[ ! -e $script ]]; then
        export SCHEME=${2#*/}
        script=$HERE/${2%/*}/scheme.sh
    fi
    SEEDS=$1 BETA2=${3#none} LR=$4 bash "$script" "${options[@]}" || {
        echo "sweep.sh: $2 with SEEDS=$1 BETA2=$3 LR=$4 failed, for the reason above" >&2
        return 1
    }
}

options=() dry_run='' results=${RESULTS:-$RUNS/results.jsonl}
for word in "$@"; do
    case $word in
        --dry-run) options+=("$word") dry_run=1 ;;
        --smoke) options+=("$word") results=$RUNS/smoke/results.jsonl ;;
        --count) points | wc -l && exit ;;
        --point) point "${@: -4}" && exit ;;
        --help | -h) usage && exit ;;
        *) echo "sweep.sh: $word is no option" >&2 && usage >&2 && exit 2 ;;
    esac
done

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    read -ra chosen < <(points | sed -n "$((SLURM_ARRAY_TASK_ID + 1))p")
    ((${#chosen[@]} == 4)) || { echo "sweep.sh: there are $(points | wc -l) points" >&2 && exit 1; }
    point "${chosen[@]}"
    exit
fi

status=0
# A point that fails does not keep the others from being run.
points | xargs -P "$JOBS" --process-slot-var=SLOT -L 1 \
    bash "$HERE/sweep.sh" "${options[@]}" --point || status=1
[[ ! $dry_run ]] || exit "$status"
# Outside a virtual environment, the one that make has made.
command -v fairseq-train >/dev/null || PATH=$HERE/../.venv/bin:$PATH
fairseq-gradinit table "$results" --published "${PUBLISHED:-$HERE/published.json}"
python3 "$HERE/heat_map.py" "$results" --out "$RUNS/heat-map.png"
echo "picture: $RUNS/heat-map.png"
exit "$status"
