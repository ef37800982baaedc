#!/usr/bin/env bash
# Start a fairseq-train command line as several processes on the CPUs of this machine, over gloo.
#
#     WORKERS=2 bash recipes/launch/gloo.sh fairseq-train DATA ...
#
# Rank 0 writes to this terminal; what the other ranks write is shown if one of them fails first.
# When a rank fails, the others are ended, and its exit status is that of this program. SIGINT and
# SIGTERM go to all ranks: GradInit then saves its state. DRY_RUN=1 prints the command lines instead.
set -euo pipefail

source "$(dirname "$0")/common.sh"

: "${WORKERS:=2}"                # processes
: "${GRACE:=10}"                 # seconds that ranks get to end after another one has failed

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

# run_rank RANK: in a process group of its own.
run_rank() {
    local code=0
    trap : INT TERM        # these are for fairseq-train alone
    (($1 == 0)) || exec >"$folder/rank-$1.log" 2>&1
    "${start[@]}" "$1" || code=$?
    # Only the first rank to fail can make this file.
    ((code == 0)) || (set -o noclobber && echo "$1 $code" >"$folder/failed") 2>/dev/null || true
}

alive() { kill -0 "${ranks[@]}" 2>/dev/null; }

# send SIGNAL: to all ranks and what they have started.
send() { kill -s "$1" -- "${ranks[@]/#/-}" 2>/dev/null || true; }

ranks=()
signalled=0
trap 'signalled=1; send INT' INT
trap 'signalled=1; send TERM' TERM
set -m
for ((rank = 0; rank < WORKERS; rank++)); do
    if ((DRY_RUN)); then
        show_or_exec "${start[@]}" "$rank"
        continue
    fi
    run_rank "$rank" </dev/null &
    ranks+=($!)
done
set +m

while alive && [[ ! -e $folder/failed ]]; do sleep 0.2; done
[[ -e $folder/failed ]] || exit 0
# A second signal would cut short the saving that the first one asked for.
((signalled)) || send TERM
for ((tenths = GRACE * 10; tenths > 0; tenths--)); do
    alive || break
    sleep 0.1
done
! alive || send KILL
wait 2>/dev/null || true
read -r rank code <"$folder/failed"
if ((rank > 0 && !signalled)); then
    echo "gloo.sh: rank $rank of $WORKERS failed with exit status $code:" >&2
    tail -n 30 "$folder/rank-$rank.log" >&2
fi
exit "$code"
