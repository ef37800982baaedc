# shellcheck shell=bash
# LibreOffice's manual, German-English, as all recipes of this folder train on it: read by them, not run.

: "${SEEDS:=1 2 3}"
: "${UPDATES:=2000}"
: "${MAX_TOKENS:=1000}"       # what a process takes at a time
: "${BATCH_TOKENS:=1000}"     # what an update learns from, of all processes
: "${SAVE_EVERY:=100}"        # updates between two checkpoints
: "${AVERAGE:=3}"             # the last so many are averaged
: "${BEAM:=5}"
: "${LENPEN:=1}"

CORPUS=libreoffice-help
SOURCE=de TARGET=en
PIECES=sentencepiece
SUBSETS=(test)
COMPOUNDS=''
MAX_LEN_A=1.5 MAX_LEN_B=10
BASELINE=libreoffice/default-warmup

MODEL_NAME="4+4 layers, d 128, ffn 512"
MODEL=(--arch transformer --share-all-embeddings --dropout 0.1 --weight-decay 0.0001)
for side in encoder decoder; do
    MODEL+=("--$side-layers" 4 "--$side-embed-dim" 128 "--$side-ffn-embed-dim" 512
        "--$side-attention-heads" 4)
done
SCHEDULE=(--lr-scheduler polynomial_decay)

# shellcheck source=recipes/lib.sh
source "$(dirname "$0")/../lib.sh"
