#!/usr/bin/env bash
# IWSLT'14 German-English: pre-LN, from the default initialisation, with Adam, without warmup.
#
#     [VARIABLE=value ...] bash recipes/iwslt14_de_en/pre-ln.sh [--dry-run] [--smoke]
set -euo pipefail

: "${LR:=5e-4}"             # peak learning rate
: "${WARMUP:=0}"            # updates in which the learning rate rises to its peak
: "${BETA2:=0.98}"          # of Adam

TITLE="pre-LN"
ARM=(--optimizer adam --adam-betas "(0.9, $BETA2)" --encoder-normalize-before
     --decoder-normalize-before)

# shellcheck source=recipes/iwslt14_de_en/corpus.sh
source "$(dirname "$0")/corpus.sh"
recipe "$@"
