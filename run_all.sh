#!/usr/bin/env bash
# Every run of the paper's figures, then the report: ./run_all.sh --help. The list of runs is in run_all.py.
exec "${PYTHON:-python}" "$(dirname "$0")/run_all.py" "$@"
