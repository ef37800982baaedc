# shellcheck shell=bash
# What the scripts of this folder share: read by them, not run.

: "${OMP_NUM_THREADS:=1}"        # threads of each process on the CPU
: "${DRY_RUN:=0}"                # 1 prints the command lines
export OMP_NUM_THREADS

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# show_or_exec COMMAND...: it takes the place of this program, if it is not to be printed.
show_or_exec() {
    ((DRY_RUN)) || exec "$@"
    printf '%q ' "$@" && echo
}

(($# > 0)) || die "no command: give it a fairseq-train command line"
