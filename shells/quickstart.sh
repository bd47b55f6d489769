#!/usr/bin/env bash
# Everything once, on a machine with nothing but Python: install, demo data, training, evaluation, a picture. CPU, no downloads of weights.
# Run again, it does only what is missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

echo "== demo data"
[[ -e demo/.complete ]] || { "$python" make_demo.py && touch demo/.complete; }

echo "== training NORA"
if [[ -e outputs/demo_nora/steps_900/meta.json ]]; then
  echo "outputs/demo_nora/steps_900 is there"
else
  "$python" train_nora.py --config configs/demo/nora.yaml --resume auto
fi

echo "== evaluation on episodes the training has not seen"
"$python" evaluate.py --checkpoint outputs/demo_nora/steps_900 --data demo/insertion
