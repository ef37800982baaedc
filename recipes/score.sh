#!/usr/bin/env bash
# Score runs of the recipes again, and add a line for each to RESULTS where something is new.
#
#     [RESULTS=FILE] bash recipes/score.sh RUN...
#
# A RUN is a folder with run.json in it, such as runs/multi30k/gradinit-adam/lr-2e-3-.../seed-1.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
command -v fairseq-train >/dev/null || PATH=$HERE/../.venv/bin:$PATH
export PYTHONPATH=$HERE/../data-prep${PYTHONPATH:+:$PYTHONPATH}
python3 "$HERE/runner.py" --results "${RESULTS:-$HERE/../runs/results.jsonl}" -- "$@"
