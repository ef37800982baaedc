#!/usr/bin/env bash
# From the GradInit initialisation, with Adam, without warmup.

source "$(dirname "$0")/corpus.sh"

: "${PRESET:=default}"      # of GradInit; paper is the setting of its authors
: "${LR:=$GRADINIT_LR}"     # peak learning rate
: "${WARMUP:=0}"            # updates in which the learning rate rises to its peak
: "${BETA2:=0.98}"          # of Adam

TITLE="GradInit"
ARM=(--optimizer adam --adam-betas "(0.9, $BETA2)" --gradinit --gradinit-preset "$PRESET")
recipe "$@"
