# shellcheck shell=bash
# Multi30k German-English, as all recipes of this folder train on it: read by them, not run.

# shellcheck source=recipes/lib.sh
source "$(dirname "$0")/../lib.sh"

# shellcheck source=recipes/small_corpus.sh
source "$(dirname "$0")/../small_corpus.sh"

CORPUS=multi30k-de-en
