# shellcheck shell=bash
# How the small corpora are trained on, German-English: their corpus.sh sets CORPUS and reads this file.

# shellcheck source=recipes/lib.sh
source "$(dirname "$0")/../lib.sh"

: "${SIZE:=small}"            # or base: model and batch of IWSLT'14, for a GPU
MODEL=(--arch transformer --share-all-embeddings)
case $SIZE in
    small)
        updates=2000 tokens=1000 save=100 ADAM_LR=2e-3
        MODEL_NAME="4+4 layers, d 128, ffn 512"
        MODEL+=(--dropout 0.1 --weight-decay 0.0001
            --encoder-layers 4 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512
            --encoder-attention-heads 4
            --decoder-layers 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 512
            --decoder-attention-heads 4)
        ;;
    base)
        updates=2400 tokens=4096 save=240 ADAM_LR=5e-4
        MODEL_NAME="6+6 layers, d 512, ffn 1024"
        MODEL+=(--dropout 0.3 --attention-dropout 0.1 --activation-dropout 0.1
            --weight-decay 0.0001
            --encoder-layers 6 --encoder-embed-dim 512 --encoder-ffn-embed-dim 1024
            --encoder-attention-heads 4
            --decoder-layers 6 --decoder-embed-dim 512 --decoder-ffn-embed-dim 1024
            --decoder-attention-heads 4)
        ;;
    *) echo "SIZE=$SIZE is not among: small base" >&2 && exit 1 ;;
esac
: "${UPDATES:=$updates}"
: "${BATCH_TOKENS:=$tokens}"  # what an update learns from, of all processes
: "${MAX_TOKENS:=}"           # what one takes at a time; without it, a share of BATCH_TOKENS
: "${SAVE_EVERY:=$save}"      # updates between two checkpoints
: "${AVERAGE:=3}"             # how many of the last checkpoints are averaged
: "${SEEDS:=1 2 3}"
: "${BEAM:=5}"
: "${LENPEN:=1}"

SOURCE=de TARGET=en
PIECES=sentencepiece
SUBSETS=(test)
COMPOUNDS=''
MAX_LEN_A=1.5 MAX_LEN_B=10
MOST_TOKENS=$tokens
ADAM_WARMUP=$((UPDATES / 4)) SGD_LR=0.0625
SCHEDULE=(--lr-scheduler polynomial_decay)
