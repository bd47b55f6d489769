#!/usr/bin/env bash
# All tests, in the same .venv as quickstart.sh, on up to 4 cores. Arguments go to pytest: bash shells/test.sh -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec "$python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile "$@" tests
