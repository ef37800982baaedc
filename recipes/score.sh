#!/usr/bin/env bash
# Score runs of the recipes again, and add a line for each to RESULTS where something is new.
#
#     [RESULTS=FILE] bash recipes/score.sh RUN...
#
# A RUN is a folder with run.json in it, such as runs/multi30k/gradinit-adam/lr-2e-3-.../seed-1.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
: "${RESULTS:=$HERE/../runs/results.jsonl}"

if ! command -v fairseq-train >/dev/null && [[ -x $HERE/../.venv/bin/fairseq-train ]]; then
    PATH=$HERE/../.venv/bin:$PATH
fi
export PYTHONPATH=$HERE/../data-prep${PYTHONPATH:+:$PYTHONPATH}
(($# > 0)) || { echo "score.sh: name the folders of one run or more" >&2 && exit 2; }
for run in "$@"; do
    python3 "$HERE/run_record.py" score "$run" --results "$RESULTS"
done
