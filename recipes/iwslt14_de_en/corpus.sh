# shellcheck shell=bash
# IWSLT'14 German-English, as all recipes of this folder train on it: read by them, not run.
# Model, regularisation, batch and schedule are those of the GradInit authors' script.

source "$(dirname "$0")/../lib.sh"

: "${SEEDS:=1 2 3 4 5}"
: "${UPDATES:=100000}"
: "${BATCH_TOKENS:=4096}"     # what an update learns from, of all processes
: "${MAX_TOKENS:=}"           # what one takes at a time; without it, a share of BATCH_TOKENS
: "${SAVE_EVERY:=1000}"       # updates between two checkpoints, about an epoch
: "${AVERAGE:=10}"            # how many of the last checkpoints are averaged
: "${BEAM:=5}"
: "${LENPEN:=1}"

CORPUS=iwslt14-de-en
SOURCE=de TARGET=en
PIECES=subword_nmt
MOST_TOKENS=4096
SUBSETS=(test)
COMPOUNDS=''
MAX_LEN_A=1.2 MAX_LEN_B=10
ADAM_LR=5e-4 GRADINIT_LR=5e-4 ADAM_WARMUP=4000 SGD_LR=0.0625

MODEL_NAME="6+6 layers, d 512, ffn 1024"
MODEL=(--arch transformer_iwslt_de_en --share-decoder-input-output-embed
    --dropout 0.3 --attention-dropout 0.1 --activation-dropout 0.1
    --weight-decay 0.0001 --clip-norm 0)
SCHEDULE=(--lr-scheduler polynomial_decay --end-learning-rate 1e-9)
