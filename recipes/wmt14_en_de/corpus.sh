# shellcheck shell=bash
# WMT'14 English-German, as all recipes of this folder train on it: read by them, not run.
# The schedule is linear in all arms: fairseq's inverse_sqrt is not defined without warmup.

source "$(dirname "$0")/../lib.sh"

: "${LANGUAGES:=en-de}"       # or en-fr
: "${SIZE:=base}"             # or big
: "${LAYERS:=6}"              # of encoder and of decoder: 6, 12 or 18
: "${SEEDS:=1 2 3}"
: "${UPDATES:=100000}"
: "${BATCH_TOKENS:=32768}"    # what an update learns from, of all processes: 8 x 4096; or 524288
: "${MAX_TOKENS:=}"           # what one takes at a time; without it, a share of BATCH_TOKENS
: "${SAVE_EVERY:=1000}"       # updates between two checkpoints
: "${AVERAGE:=10}"            # how many of the last checkpoints are averaged
: "${BEAM:=4}"
: "${LENPEN:=0.6}"

SOURCE=en TARGET=${LANGUAGES#en-}
CORPUS=wmt14-$LANGUAGES
PIECES=subword_nmt
MOST_TOKENS=4096
SUBSETS=(valid test)          # newstest2013 and newstest2014
MAX_LEN_A=1 MAX_LEN_B=50
ADAM_LR=7e-4 ADAM_WARMUP=4000 SGD_LR=0.0625
# Papers score English-German after cutting words at their hyphens.
COMPOUNDS=
[[ $TARGET != de ]] || COMPOUNDS=1

case $SIZE in
    # Without warmup GradInit holds up to lr sqrt(d ffn) = 0.51: docs/experiments.md.
    base) MODEL=(--arch transformer_wmt_en_de --dropout 0.1) WIDTHS="d 512, ffn 2048" GRADINIT_LR=5e-4 ;;
    big) MODEL=(--arch transformer_wmt_en_de_big --dropout 0.3) WIDTHS="d 1024, ffn 4096" GRADINIT_LR=2.5e-4 ;;
    *) echo "SIZE=$SIZE is not among: base big" >&2 && exit 1 ;;
esac
MODEL_NAME="$LAYERS+$LAYERS layers, $WIDTHS"
MODEL+=(--encoder-layers "$LAYERS" --decoder-layers "$LAYERS" --share-all-embeddings)
SCHEDULE=(--lr-scheduler polynomial_decay)
