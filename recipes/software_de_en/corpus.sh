# shellcheck shell=bash
# German-English software texts, as all recipes of this folder train on it: read by them, not run.

case ${SIZE:-small} in
    small) updates=4000 save=200 rate=1e-3 sizes="4 256 1024 4" ;;
    base) updates=10000 save=500 ;;
esac

source "$(dirname "$0")/../small_corpus.sh"

CORPUS=software-de-en
