#!/usr/bin/env bash
# From the default initialisation, with Adam, without warmup.

source "$(dirname "$0")/corpus.sh"

: "${LR:=$ADAM_LR}"         # peak learning rate
: "${WARMUP:=0}"            # updates in which the learning rate rises to its peak
: "${BETA2:=0.98}"          # of Adam

TITLE="default initialisation"
ARM=(--optimizer adam --adam-betas "(0.9, $BETA2)")
recipe "$@"
