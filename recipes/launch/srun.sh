#!/usr/bin/env bash
# Start a fairseq-train command line on the GPUs of a Slurm allocation, one task for each, with NCCL.
#
#     bash recipes/launch/srun.sh fairseq-train DATA ...      in a batch script, or under salloc
#
# fairseq takes each task's rank from Slurm, and rank 0 waits for the others on a TCP port: nothing
# is written to a file system. It ends when all tasks have ended, or the first one failed, with
# srun's exit status. DRY_RUN=1 prints the command line instead.
set -euo pipefail

source "$(dirname "$0")/common.sh"

: "${NODES:=${SLURM_JOB_NUM_NODES:-1}}"              # of the allocation
: "${GPUS_PER_NODE:=${SLURM_GPUS_ON_NODE:-0}}"       # on each of them
: "${CPUS_PER_TASK:=${SLURM_CPUS_PER_TASK:-1}}"      # cores of each task
: "${MASTER_PORT:=$((20000 + ${SLURM_JOB_ID:-0} % 10000))}"  # apart from other jobs' on the node
: "${SRUN_OPTIONS:=}"                                # more options for srun, in words

[[ ${SLURM_JOB_ID:-} ]] || die "there is no allocation: call it in a batch script or under salloc"
((GPUS_PER_NODE > 0)) ||
    die "GPUS_PER_NODE is 0: ask Slurm for GPUs, for example with --gpus-per-node"

tasks=$((NODES * GPUS_PER_NODE))
read -ra more <<<"$SRUN_OPTIONS"
# Variables of torchrun would be believed before those of Slurm. fairseq chooses the GPU by the
# task's number on its node, so each must see all of them.
show_or_exec env -u RANK -u WORLD_SIZE \
    srun --nodes "$NODES" --ntasks "$tasks" --ntasks-per-node "$GPUS_PER_NODE" \
    --cpus-per-task "$CPUS_PER_TASK" --kill-on-bad-exit=1 --gpu-bind=none "${more[@]}" \
    "$@" --distributed-world-size "$tasks" --distributed-port "$MASTER_PORT"
