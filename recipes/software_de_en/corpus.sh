# shellcheck shell=bash
# German-English software texts, as all recipes of this folder train on it: read by them, not run.

# shellcheck source=recipes/lib.sh
source "$(dirname "$0")/../lib.sh"

case ${SIZE:=small} in
    small) updates=4000 save=200 rate=1e-3 sizes="4 256 1024 4" ;;
    base) updates=10000 save=500 ;;
esac

# shellcheck source=recipes/small_corpus.sh
source "$(dirname "$0")/../small_corpus.sh"

CORPUS=software-de-en
