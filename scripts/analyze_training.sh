#!/usr/bin/env bash
# Tell what the clusters of a training profile show. A profile is what this writes:
#
#     entrenar trace run --ml-anomaly --ml-clusters 5 --ml-compare --format json -- COMMAND > training-profile.json
#
# usage: scripts/analyze_training.sh training-profile.json
#
# Every field of the analysis must be there: a missing one ends the script with exit code 2 and its name.
set -euo pipefail

if [ $# -ne 1 ]; then
    sed -n 's/^# usage: /usage: /p' "$0" >&2
    exit 2
fi
if [ ! -f "$1" ]; then
    echo "analyze_training: $1 must be a file, and is none" >&2
    exit 2
fi
exec "${PYTHON:-python3}" -m entrenar trace clusters --format text "$1"
