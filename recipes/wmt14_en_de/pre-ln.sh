#!/usr/bin/env bash
# WMT'14 English-German: pre-LN, from the default initialisation, with Adam, without warmup.
#
#     [VARIABLE=value ...] bash recipes/wmt14_en_de/pre-ln.sh [--dry-run] [--smoke]
set -euo pipefail

: "${LR:=7e-4}"             # peak learning rate
: "${WARMUP:=0}"            # updates in which the learning rate rises to its peak
: "${BETA2:=0.98}"          # of Adam

TITLE="pre-LN"
ARM=(--optimizer adam --adam-betas "(0.9, $BETA2)" --encoder-normalize-before
     --decoder-normalize-before)

# shellcheck source=recipes/wmt14_en_de/corpus.sh
source "$(dirname "$0")/corpus.sh"
recipe "$@"
