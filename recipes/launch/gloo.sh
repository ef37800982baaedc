#!/usr/bin/env bash
# Start a fairseq-train command line as several processes on the CPUs of this machine, over gloo.
#
#     WORKERS=2 bash recipes/launch/gloo.sh fairseq-train DATA ...
#
# Rank 0 writes to this terminal; what the other ranks write is shown if one of them fails first.
# When a rank fails, the others are ended, and its exit status is that of this program. SIGINT and
# SIGTERM go to all ranks: GradInit then saves its state. DRY_RUN=1 prints the command lines instead.
set -euo pipefail

: "${WORKERS:=2}"                # processes
: "${GRACE:=10}"                 # seconds that ranks get to end after another one has failed
: "${OMP_NUM_THREADS:=1}"        # threads of each rank
: "${DRY_RUN:=0}"
export OMP_NUM_THREADS

die() {
    echo "gloo.sh: $*" >&2
    exit 1
}

(($# > 0)) || die "no command: give it a fairseq-train command line"
((WORKERS > 0)) || die "WORKERS=$WORKERS: there must be at least one process"

# Where the ranks meet; a file of an earlier run would mislead them.
folder=$(mktemp -d "${TMPDIR:-/tmp}/gloo.XXXXXXXX")
trap 'rm -rf "$folder"' EXIT
start=(
    # fairseq would use GPUs that it sees.
    env CUDA_VISIBLE_DEVICES=
    "$@" --cpu --distributed-world-size "$WORKERS"
    --distributed-init-method "file://$folder/rendezvous" --distributed-no-spawn
    # pytorch_ddp, the default, wants devices.
    --distributed-backend gloo --ddp-backend legacy_ddp
    --distributed-rank
)

if ((DRY_RUN)); then
    for ((rank = 0; rank < WORKERS; rank++)); do
        printf '%q ' "${start[@]}" "$rank" && echo
    done
    exit
fi

# run_rank RANK: in a process group of its own.
run_rank() {
    local code=0
    trap : INT TERM        # these are for fairseq-train alone
    exec 3>&2 2>/dev/null  # bash would have a word on a child that was killed
    if (($1 == 0)); then
        "${start[@]}" "$1" 2>&3 3>&- || code=$?
    else
        "${start[@]}" "$1" >"$folder/rank-$1.log" 2>&1 3>&- || code=$?
    fi
    if ((code > 0)); then
        echo "$1 $code" >"$folder/rank-$1.failed"
        # Only the first rank to fail can make this link.
        ln "$folder/rank-$1.failed" "$folder/failed" || true
    fi
    return "$code"
}

ranks=()
signalled=0

alive() { kill -0 "${ranks[@]}" 2>/dev/null; }

# send SIGNAL: to all ranks and what they have started.
send() { kill -s "$1" -- "${ranks[@]/#/-}" 2>/dev/null || true; }

# shellcheck disable=SC2329  # the traps call it
forward() {
    signalled=1
    send "$1"
}

trap 'forward INT' INT
trap 'forward TERM' TERM
set -m
for ((rank = 0; rank < WORKERS; rank++)); do
    run_rank "$rank" </dev/null &
    ranks+=($!)
done
set +m

while alive && [[ ! -e $folder/failed ]]; do sleep 0.2; done
if [[ -e $folder/failed ]]; then
    # A second signal would cut short the saving that the first one asked for.
    ((signalled)) || send TERM
    for ((tenths = GRACE * 10; tenths > 0; tenths--)); do
        alive || break
        sleep 0.1
    done
fi
code=0
{
    ! alive || send KILL
    for rank in "${ranks[@]}"; do
        wait "$rank" || code=$?
    done
} 2>/dev/null
if [[ -e $folder/failed ]]; then
    read -r rank code <"$folder/failed"
    if ((rank > 0 && !signalled)); then
        echo "gloo.sh: rank $rank of $WORKERS failed with exit status $code:" >&2
        tail -n 30 "$folder/rank-$rank.log" >&2
    fi
fi
exit "$code"
