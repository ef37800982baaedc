# shellcheck shell=bash
# Multi30k German-English, as all recipes of this folder train on it: read by them, not run.

source "$(dirname "$0")/../small_corpus.sh"

CORPUS=multi30k-de-en
