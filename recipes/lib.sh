# shellcheck shell=bash
# What the recipes share: a recipe reads its corpus.sh, which reads this file, sets its variables, and
# calls `recipe "$@"`.
# For each seed: prepare the corpus, train, average checkpoints, translate, score. Each step that
# has ended well is left out when the same command is given again; training goes on from its last
# checkpoint. Everything lies in RUNS; the scores are lines of RESULTS.

LIB=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$LIB")

: "${RUNS:=$ROOT/runs}"              # checkpoints, logs, translations
: "${DATA:=$RUNS/data}"              # corpora, a folder each
: "${RESULTS:=$RUNS/results.jsonl}"  # a line for each run
: "${MIRROR:=}"                      # folder or address to take the corpus's files from
: "${STEPS:=prepare train average translate score}"
: "${PUBLISHED:=$LIB/published.json}"  # file of published figures, to stand beside our own
: "${EXTRA:=}"                       # more options for fairseq-train, in words
: "${GPUS:=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}"  # of this machine; 0 is the CPU
: "${NODES:=1}"                      # machines with as many GPUs
: "${NODE_RANK:=0}"                  # of this machine; only the first one does more than train
: "${WORKERS:=$((GPUS > 0 ? NODES * GPUS : 1))}"  # processes that train
: "${LAUNCH:=}"                      # what starts several processes, such as launch/torchrun.sh
: "${FP16:=$((GPUS > 0))}"           # train in fp16: 1 or 0
export NODES NODE_RANK WORKERS GPUS_PER_NODE=$GPUS
for name in RUNS DATA RESULTS; do
    [[ ${!name} == /* ]] || printf -v "$name" '%s' "$PWD/${!name}"
done

# glibc returns freed memory at every step unless told otherwise: 10 to 30 % of the time on a CPU.
for limit in MMAP_THRESHOLD TRIM_THRESHOLD TOP_PAD; do
    export "MALLOC_${limit}_=$((1 << 30))"
done

# The programs here use data-prep's modules.
export PYTHONPATH=$ROOT/data-prep${PYTHONPATH:+:$PYTHONPATH}

DRY_RUN=0
SMOKE=0

# Outside a virtual environment, the one that make has made.
if ! command -v fairseq-train >/dev/null && [[ -x $ROOT/.venv/bin/fairseq-train ]]; then
    PATH=$ROOT/.venv/bin:$PATH
fi

say() { printf '%s\n' "$*"; }

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# A command as one would type it.
quoted() {
    local word text=
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        text+="$word "
    done
    printf '%s' "${text% }"
}

wanted() { [[ " $STEPS " == *" $1 "* ]]; }

# usage: print the comment at the top of the recipe and its variables.
usage() {
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
    say
    say "Variables, and what they are now:"
    local line
    # shellcheck disable=SC2016
    grep -h '^: "\${' "$0" "$(dirname "$0")/corpus.sh" "$LIB/lib.sh" | while read -r line; do
        [[ $line =~ ^:\ \"\$\{([A-Z0-9_]+):=.*\}\"\ *(.*)$ ]]
        printf '  %-24s %s\n' "${BASH_REMATCH[1]}=${!BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
    done
}

# choose_size NAME...: these are what SIZE can be.
choose_size() {
    # shellcheck disable=SC2153  # corpus.sh has set it
    [[ " $* " == *" $SIZE "* ]] || die "SIZE=$SIZE is not among: $*"
    KNOWN_SIZES=("$@")
}

# by_size VALUE...: the value for SIZE, in the order of choose_size.
by_size() {
    local size
    for size in "${KNOWN_SIZES[@]}"; do
        [[ $size != "$SIZE" ]] || break
        shift
    done
    say "$1"
}

# transformer LAYERS WIDTH FFN HEADS: adds the sizes of both sides to MODEL, and names them.
transformer() {
    local side
    for side in encoder decoder; do
        MODEL+=("--$side-layers" "$1" "--$side-embed-dim" "$2" "--$side-ffn-embed-dim" "$3"
            "--$side-attention-heads" "$4")
    done
    MODEL_NAME="$1+$1 layers, d $2, ffn $3"
}

# log_of NAME: of this machine, since lines of several may not stay whole in one file.
log_of() {
    local node=
    ((NODE_RANK == 0)) || node=.node-$NODE_RANK
    say "$RUN/$1$node.log"
}

# once NAME KEY COMMAND...: run a command with its output in a log, unless it ended well before with
# the same key. A key is the command and those of the steps before it.
once() {
    local name=$1 key=$2 log
    shift 2
    log=$(log_of "$name")
    if [[ -e $RUN/$name.done && $(<"$RUN/$name.done") == "$key" ]]; then
        say "$name: done before"
        return
    fi
    quoted "$@"
    say " >> $log"
    ((DRY_RUN)) && return
    # What it made before is overwritten.
    ((NODE_RANK > 0)) || rm -f "$RUN/$name.done"
    # A log that was cut off ends within a line.
    [[ ! -s $log || -z $(tail -c 1 "$log") ]] || say >>"$log"
    "$@" >>"$log" 2>&1 || return
    stamp "$name" "$key"
}

# write_whole FILE TEXT: under another name first, never half.
write_whole() {
    { printf '%s' "$2" >"$1.partial" && mv "$1.partial" "$1"; } 2>/dev/null ||
        die "$1 cannot be written: make room on its disk, or choose another folder with RUNS"
}

# stamp NAME KEY: this step has ended.
stamp() { ((NODE_RANK > 0)) || write_whole "$RUN/$1.done" "$2"; }

# Where a disk is full, a log does not end with the reason.
has_room() {
    local status=0
    head -c 64K /dev/zero >"$RUN/room.partial" 2>/dev/null || status=1
    rm -f "$RUN/room.partial"
    return "$status"
}

failed() {
    has_room || die "$1 failed: there is no room left in $RUN: make some, and give the same" \
        "command again"
    local log
    log=$(log_of "$1")
    die "$1 failed: $(grep -v '^ *$' "$log" | tail -n 1) (all of it: $log)"
}

# lock FILE [OPTION...]: until this program ends, or lets go of LOCK. What it starts holds the lock
# too: nothing that outlived a kill is disturbed. Returns 75 if another one has it and OPTION is -n.
lock() {
    local status=0
    exec {LOCK}>"$1"
    flock -E 75 "${@:2}" "$LOCK" || status=$?
    ((status != 0 && status != 75)) || return "$status"
    say "$1 is on a file system without locks: see that no other recipe works there" >&2
}

# ---- The steps.

prepare() {
    local command=(python3 "$ROOT/data-prep/prepare.py" "$CORPUS" --out "$DATA/$CORPUS"
        --source-lang "$SOURCE" --target-lang "$TARGET" ${MIRROR:+--mirror "$MIRROR"})
    quoted "${command[@]}"
    say
    ((DRY_RUN)) && return
    mkdir -p "$DATA"
    # Recipes side by side wait for the first one.
    lock "$DATA/$CORPUS.lock"
    "${command[@]}" || die "the corpus could not be prepared"
    exec {LOCK}>&-
}

# share_of TOKENS MOST: what each process takes at a time, MOST if it can be, when all of them take
# TOKENS in an update.
share_of() {
    local most=$2 each=$(($1 / WORKERS)) times
    for ((times = (each + most - 1) / most; times > 0 && each / times > most / 2; times++)); do
        ((each % times)) || { say $((each / times)) && return; }
    done
    say "$((each > 0 && each < most ? each : most))"
}

# Sets UPDATE_FREQ so that an update learns from BATCH_TOKENS on whatever trains.
choose_update_freq() {
    local here=$((GPUS > 0 ? GPUS : 1)) once_around=$((MAX_TOKENS * WORKERS))
    ((WORKERS > 0)) || die "WORKERS=$WORKERS: there must be at least one process"
    [[ $LAUNCH ]] || ((WORKERS <= here)) ||
        die "WORKERS=$WORKERS, and without LAUNCH $here can be started: LAUNCH=launch/gloo.sh" \
            "starts more on CPUs, launch/torchrun.sh or launch/srun.sh on several machines"
    [[ $LAUNCH != *torchrun.sh && $LAUNCH != *srun.sh ]] || ((WORKERS == NODES * GPUS)) ||
        die "WORKERS=$WORKERS, and $LAUNCH starts one for each of NODES x GPUS = $NODES x $GPUS"
    ((BATCH_TOKENS % WORKERS == 0)) ||
        die "BATCH_TOKENS=$BATCH_TOKENS cannot be divided by the $WORKERS processes that train:" \
            "choose another BATCH_TOKENS, or another number of processes"
    UPDATE_FREQ=$((BATCH_TOKENS / once_around))
    ((UPDATE_FREQ >= 1 && UPDATE_FREQ * once_around == BATCH_TOKENS)) ||
        die "BATCH_TOKENS=$BATCH_TOKENS is no multiple of MAX_TOKENS=$MAX_TOKENS times the" \
            "$WORKERS processes that train: choose a MAX_TOKENS that divides" \
            "$((BATCH_TOKENS / WORKERS))"
}

# What has a variable, which tables and other steps read, is not to be set behind their backs.
declare -A VARIABLES=(
    [--lr]=LR [--warmup-updates]=WARMUP [--max-update]=UPDATES [--total-num-update]=UPDATES
    [--max-tokens]=MAX_TOKENS [--update-freq]=BATCH_TOKENS [--distributed-world-size]=WORKERS
    [--seed]=SEEDS [--save-dir]=RUNS [--save-interval-updates]=SAVE_EVERY
    [--keep-interval-updates]=AVERAGE [--fp16]=FP16
)

# check_extra WORD...: dies if EXTRA has an option that it must not have.
check_extra() {
    local word
    for word in "$@"; do
        word=${word%%=*}
        [[ ! $word =~ ^--(en|de)coder-((ffn-)?embed-dim|layers)$ ]] ||
            die "EXTRA has $word: the model's size, and its name in the tables, stand in" \
                "$(dirname "$0")/corpus.sh"
        [[ -z ${VARIABLES[$word]:-} ]] || die "EXTRA has $word: set ${VARIABLES[$word]} instead"
    done
}

# Sets SETTINGS, all that decides what is trained but for the corpus's bytes and the seed.
choose_settings() {
    local extra log_every=$((UPDATES > 75 ? UPDATES / 75 : 1))
    read -ra extra <<<"$EXTRA"
    check_extra ${extra[@]+"${extra[@]}"}
    choose_update_freq
    SETTINGS=(
        --user-dir fairseq_gradinit --task translation
        --source-lang "$SOURCE" --target-lang "$TARGET"
        "${MODEL[@]}" "${ARM[@]}"
        --criterion label_smoothed_cross_entropy --label-smoothing 0.1
        --lr "$LR" --warmup-updates "$WARMUP" "${SCHEDULE[@]}"
        --total-num-update "$UPDATES" --max-update "$UPDATES"
        # With fairseq's default of 8, ve-fairseq 0.12.3 leaves sentences out.
        --max-tokens "$MAX_TOKENS" --update-freq "$UPDATE_FREQ" --required-batch-size-multiple 1
        # Without the thread that reads ahead: it can abort a training that has just ended.
        --data-buffer-size 0
        --save-interval-updates "$SAVE_EVERY" --keep-interval-updates "$AVERAGE"
        --no-epoch-checkpoints --save-interval 1000000 --validate-interval 1000000
        --log-format json --log-interval "$log_every"
    )
    ((FP16)) && SETTINGS+=(--fp16)
    ((GPUS > 0)) && [[ -z $LAUNCH ]] && SETTINGS+=(--distributed-world-size "$WORKERS")
    SETTINGS+=(${extra[@]+"${extra[@]}"})
}

# What smoke runs change: a tiny corpus, model and length, in a folder of its own.
shrink() {
    RUNS=$RUNS/smoke
    DATA=$RUNS/data
    RESULTS=$RUNS/results.jsonl
    CORPUS=numbers PIECES=subword_nmt MIRROR='' SEEDS=1 SUBSETS=(test)
    [[ $SOURCE == en ]] && TARGET=de
    # With update-freq where the recipe has it.
    BATCH_TOKENS=$((500 * WORKERS * (BATCH_TOKENS > MAX_TOKENS * WORKERS ? 2 : 1)))
    MAX_TOKENS=500
    UPDATES=12 SAVE_EVERY=4 AVERAGE=2 BEAM=2 WARMUP=$((WARMUP > 0 ? 4 : 0))
    local name=$MODEL_NAME
    transformer 1 32 64 2
    MODEL_NAME=$name
    [[ " ${ARM[*]} " == *" --gradinit "* ]] && ARM+=(--gradinit-iterations 2)
    return 0
}

# train_and_score SEED: all that is done for a seed.
train_and_score() {
    local seed=$1 data=$DATA/$CORPUS name digest subset key
    # As many tokens on more processes are the same options, and another batch.
    digest=$(quoted "${SETTINGS[@]}" "$BATCH_TOKENS" | sha256sum)
    name=lr-$LR-${digest:0:8}
    RUN=$RUNS/$RECIPE/$name/seed-$seed
    local checkpoints=$RUN/checkpoints
    local train=(fairseq-train "$data/data-bin" "${SETTINGS[@]}" --seed "$seed"
        --save-dir "$checkpoints")
    local average=(python3 "$LIB/average_checkpoints.py" "$checkpoints" --last "$AVERAGE"
        --output "$RUN/average.pt")

    say
    say "== $RECIPE, seed $seed"
    if ((!DRY_RUN)); then
        mkdir -p "$RUN"
        if ((NODE_RANK == 0)); then
            lock "$RUN/lock" -n || die "another program is at work in $RUN: wait for it, or end it"
        fi
        same_corpus "$data/data-bin"
    fi
    key=$(quoted "${train[@]}")
    ((DRY_RUN || NODE_RANK > 0)) || about "$seed" "$key"
    if wanted train; then
        # fairseq-train would add an update to a training that ended before its stamp was written.
        ! ended "$checkpoints" || stamp train "$key"
        once train "$key" ${LAUNCH:+bash "$LIB/$LAUNCH"} "${train[@]}" || not_trained "$key"
    fi
    ((NODE_RANK > 0)) && return
    if [[ ! -e $RUN/diverged ]]; then
        key+=$'\n'$(quoted "${average[@]}")
        ! wanted average || once average "$key" "${average[@]}" || failed average
        for subset in "${SUBSETS[@]}"; do
            local translate=(fairseq-generate "$data/data-bin" --user-dir fairseq_gradinit
                --task translation --source-lang "$SOURCE" --target-lang "$TARGET"
                --gen-subset "$subset" --path "$RUN/average.pt" --results-path "$RUN"
                --beam "$BEAM" --lenpen "$LENPEN" --max-len-a "$MAX_LEN_A" --max-len-b "$MAX_LEN_B"
                --remove-bpe "$PIECES" --max-tokens 8000 --required-batch-size-multiple 1)
            ((FP16)) && translate+=(--fp16)
            ! wanted translate ||
                once "translate-$subset" "$key"$'\n'"$(quoted "${translate[@]}")" \
                    "${translate[@]}" || failed "translate-$subset"
        done
    fi
    wanted score || return 0
    quoted bash "$LIB/score.sh" "$RUN"
    say
    ((DRY_RUN)) || RESULTS=$RESULTS bash "$LIB/score.sh" "$RUN" || die "$RUN could not be scored"
    ((DRY_RUN)) || exec {LOCK}>&-
}

# ended CHECKPOINTS: whether they are of the last update.
ended() {
    [[ -e $1 ]] && ((!DRY_RUN)) || return 1
    local updates
    updates=$(python3 "$LIB/resume.py" "$1") || die "$RUN cannot go on, for the reason above"
    ((updates >= UPDATES))
}

# A run is of one corpus: what was trained on other bytes must not go on, and is not thrown away.
same_corpus() {
    local digest
    digest=$(cat "$1"/dict.* "$1"/*.idx "$1"/*.bin | sha256sum) || die "there is no corpus in $1"
    ((NODE_RANK > 0)) || [[ -e $RUN/corpus.sha256 ]] || write_whole "$RUN/corpus.sha256" "$digest"
    # Another machine may be here before the first one.
    [[ ! -e $RUN/corpus.sha256 || $(<"$RUN/corpus.sha256") == "$digest" ]] ||
        die "the corpus in $1 is another one than when $RUN was begun: remove that folder, or" \
            "choose another one with RUNS"
}

# about SEED COMMAND: write down what the run is, for score.sh.
about() {
    python3 "$LIB/run_record.py" begin "$RUN" --recipe "$RECIPE" --title "$TITLE" \
        --model "$MODEL_NAME" --corpus "$DATA/$CORPUS" --seed "$1" --command "$2" \
        --decoding "average $AVERAGE" "beam $BEAM" "lenpen $LENPEN" \
        "max-len-a $MAX_LEN_A" "max-len-b $MAX_LEN_B" \
        --workers "$WORKERS" --batch-tokens "$BATCH_TOKENS" --subsets "${SUBSETS[@]}" \
        ${COMPOUNDS:+--split-compounds} --baseline "$BASELINE" ||
        die "$RUN/run.json could not be written"
}

# not_trained KEY: a run that diverged is a result, anything else an error.
not_trained() {
    local reason
    reason=$(python3 "$LIB/run_record.py" divergence "$(log_of train)") || failed train
    say "diverged: $reason"
    ((NODE_RANK > 0)) || write_whole "$RUN/diverged" "$reason"
    stamp train "$1"
}

recipe() {
    local word seed arm
    arm=$(basename "$0" .sh)
    # One script for many initialisations, each of which is an arm.
    [[ $arm != scheme ]] || arm=$SCHEME
    RECIPE=$(basename "$(cd "$(dirname "$0")" && pwd)")/$arm
    for word in "$@"; do
        case $word in
            --dry-run) DRY_RUN=1 ;;
            --smoke) SMOKE=1 ;;
            --help | -h) usage && exit ;;
            *) die "$word is no option: --dry-run prints the commands, --smoke tries them on a" \
                "tiny corpus, --help lists the variables" ;;
        esac
    done
    ((!SMOKE)) || shrink
    for word in $STEPS; do
        [[ " prepare train average translate score " == *" $word "* ]] ||
            die "STEPS has $word, which is none of: prepare train average translate score"
    done
    command -v fairseq-train >/dev/null || ((DRY_RUN)) ||
        die "fairseq-train is not on PATH: run make test once, or pip install '.[fairseq,quickstart]'"
    choose_settings
    ! wanted prepare || ((NODE_RANK > 0)) || prepare
    for seed in $SEEDS; do
        train_and_score "$seed"
    done
    ((DRY_RUN || NODE_RANK > 0)) || ! wanted score ||
        fairseq-gradinit table "$RESULTS" --published "$PUBLISHED"
}
