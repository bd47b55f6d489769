#!/usr/bin/env bash
# Style, then all tests, in the same .venv as quickstart.sh, on up to 4 cores. Arguments go to pytest:
# bash shells/test.sh -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
"$python" -m ruff format --check --quiet . || { "$python" -m ruff format --diff . 2>&1 | head -40; exit 1; }
"$python" -m ruff check --quiet .
exec "$python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile "$@" tests
