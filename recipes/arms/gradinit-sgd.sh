#!/usr/bin/env bash
# From the GradInit initialisation, with SGD, without warmup.

source "$(dirname "$0")/corpus.sh"

: "${LR:=$SGD_LR}"          # peak learning rate
: "${WARMUP:=0}"            # updates in which the learning rate rises to its peak
: "${MOMENTUM:=0.9}"        # of SGD

TITLE="GradInit"
ARM=(--optimizer sgd --momentum "$MOMENTUM" --gradinit --gradinit-preset default)
recipe "$@"
