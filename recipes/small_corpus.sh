# shellcheck shell=bash
# How small German-English corpora are trained on. Their corpus.sh reads this file; what it sets before
# stays: updates, save, rate and sizes (layers, width, ffn, heads).

source "$(dirname "$0")/../lib.sh"

: "${SIZE:=small}"            # or base: model and batch of IWSLT'14, for a GPU
case $SIZE in
    small)
        : "${updates:=2000}" "${save:=100}" "${rate:=2e-3}" "${sizes:=4 128 512 4}"
        tokens=1000
        DROPOUT=(--dropout 0.1)
        ;;
    base)
        : "${updates:=2400}" "${save:=240}" "${rate:=5e-4}" "${sizes:=6 512 1024 4}"
        tokens=4096
        DROPOUT=(--dropout 0.3 --attention-dropout 0.1 --activation-dropout 0.1)
        ;;
    *) echo "SIZE=$SIZE is not among: small base" >&2 && exit 1 ;;
esac
: "${SEEDS:=1 2 3}"
: "${UPDATES:=$updates}"
: "${BATCH_TOKENS:=$tokens}"  # what an update learns from, of all processes
: "${MAX_TOKENS:=}"           # what one takes at a time; without it, a share of BATCH_TOKENS
: "${SAVE_EVERY:=$save}"      # updates between two checkpoints
: "${AVERAGE:=3}"             # how many of the last checkpoints are averaged
: "${BEAM:=5}"
: "${LENPEN:=1}"

SOURCE=de TARGET=en
PIECES=sentencepiece
MOST_TOKENS=$tokens
SUBSETS=(test)
COMPOUNDS=''
MAX_LEN_A=1.5 MAX_LEN_B=10
ADAM_LR=$rate GRADINIT_LR=$rate ADAM_WARMUP=$((UPDATES / 4)) SGD_LR=0.0625

read -r layers width ffn heads <<<"$sizes"
MODEL_NAME="$layers+$layers layers, d $width, ffn $ffn"
MODEL=(--arch transformer --share-all-embeddings "${DROPOUT[@]}" --weight-decay 0.0001)
for side in encoder decoder; do
    MODEL+=("--$side-layers" "$layers" "--$side-embed-dim" "$width"
        "--$side-ffn-embed-dim" "$ffn" "--$side-attention-heads" "$heads")
done
SCHEDULE=(--lr-scheduler polynomial_decay)
