#!/usr/bin/env bash
# All tests, in the same .venv as quickstart.sh. Arguments go to pytest: bash shells/test.sh -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec "$python" -m pytest -q "$@" tests
