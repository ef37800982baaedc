# shellcheck shell=bash
# German-English software texts, as all recipes of this folder train on it: read by them, not run.

# shellcheck source=recipes/lib.sh
source "$(dirname "$0")/../lib.sh"

: "${SIZE:=small}"            # or base: model and batch of IWSLT'14, for a GPU
choose_size small base
: "${SEEDS:=1 2 3}"
: "${UPDATES:=$(by_size 4000 10000)}"
: "${BATCH_TOKENS:=$(by_size 1000 4096)}"  # what an update learns from, of all processes
: "${MAX_TOKENS:=$(share_of "$BATCH_TOKENS" "$(by_size 1000 4096)")}"  # what one takes at a time
: "${SAVE_EVERY:=$(by_size 200 500)}"  # updates between two checkpoints
: "${AVERAGE:=3}"             # the last so many are averaged
: "${BEAM:=5}"
: "${LENPEN:=1}"

CORPUS=software-de-en
SOURCE=de TARGET=en
PIECES=sentencepiece
SUBSETS=(test)               # of all domains; the corpus has one for each, too
COMPOUNDS=''
MAX_LEN_A=1.5 MAX_LEN_B=10
BASELINE=software_de_en/default-warmup
# shellcheck disable=SC2034  # the recipes read them
ADAM_LR=$(by_size 1e-3 5e-4) ADAM_WARMUP=$((UPDATES / 4)) SGD_LR=0.0625

MODEL=(--arch transformer --share-all-embeddings)
case $SIZE in
    small) MODEL+=(--dropout 0.1 --weight-decay 0.0001) && transformer 4 256 1024 4 ;;
    base)
        MODEL+=(--dropout 0.3 --attention-dropout 0.1 --activation-dropout 0.1
            --weight-decay 0.0001)
        transformer 6 512 1024 4
        ;;
esac
SCHEDULE=(--lr-scheduler polynomial_decay)
