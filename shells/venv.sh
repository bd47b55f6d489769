# Sourced by quickstart.sh and test.sh: makes .venv once from requirements.txt, goes to the repository, sets $python. Needs Python >= 3.10.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$PWD/.venv/bin/python"
stamp=".venv/.installed-$(cksum requirements.txt | cut -d' ' -f1)"
if [[ ! -e "$stamp" ]]; then
  base="${PYTHON:-python3}"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, $base is $("$base" --version 2>&1): PYTHON=/path/to/python3 bash ${0}" >&2; exit 1; }
  echo "== installing requirements.txt into .venv"
  "$base" -m venv .venv
  "$python" -m pip install --disable-pip-version-check -r requirements.txt 2> >(grep -v "is ignored" >&2) | sed -un 's/^Collecting \([^ ]*\).*/  \1/p; s/^Installing collected.*/installing/p'
  touch "$stamp"
fi
