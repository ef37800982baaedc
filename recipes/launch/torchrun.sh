#!/usr/bin/env bash
# Start a fairseq-train command line on the GPUs of one machine or several, with torchrun and NCCL.
#
#     bash recipes/launch/torchrun.sh fairseq-train DATA ...
#
# On several machines call it on each of them, with NODES, NODE_RANK and MASTER_ADDR. It ends when
# all processes have ended, or the first one failed, with torchrun's exit status. DRY_RUN=1 prints
# the command line instead.
set -euo pipefail

source "$(dirname "$0")/common.sh"

: "${NODES:=1}"                  # machines
: "${GPUS_PER_NODE:=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}"  # on each of them
: "${NODE_RANK:=0}"              # of this machine, from 0
: "${MASTER_ADDR:=}"             # name or address of machine 0, as the others reach it
: "${MASTER_PORT:=29500}"        # a free port there

# fairseq gives the process of rank r the GPU r modulo their number, which must not be 0.
((GPUS_PER_NODE > 0)) || die "GPUS_PER_NODE is 0: on a machine without GPUs use gloo.sh"

meeting=(--standalone)
if ((NODES > 1)); then
    [[ $MASTER_ADDR ]] || die "MASTER_ADDR is not set: $NODES machines need the address of the first"
    meeting=(--nnodes "$NODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
# fairseq's default is the number of GPUs of this machine, and with 1 it ignores the other machines.
show_or_exec torchrun --nproc-per-node "$GPUS_PER_NODE" "${meeting[@]}" \
    --no-python "$@" --distributed-world-size "$((NODES * GPUS_PER_NODE))"
