#!/usr/bin/env bash
# From another initialisation than GradInit, with Adam, without warmup.

source "$(dirname "$0")/corpus.sh"

: "${SCHEME:=pre-ln}"       # of fairseq-train's --init-scheme, see docs/rivals.md
: "${LR:=$ADAM_LR}"         # peak learning rate
: "${WARMUP:=0}"            # updates in which the learning rate rises to its peak
: "${BETA2:=0.98}"          # of Adam

TITLE=$SCHEME
ARM=(--optimizer adam --adam-betas "(0.9, $BETA2)" --init-scheme "$SCHEME")
recipe "$@"
