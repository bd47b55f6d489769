#!/usr/bin/env bash
# Everything once, on a machine with nothing but Python: install, demo data, training, evaluation, a picture. CPU, no downloads of weights.
# Run again, it does only what is missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

echo "== demo data"
[[ -e demo/.complete ]] || { "$python" make_demo.py insertion qwen2_5_vl && touch demo/.complete; }

echo "== training NORA"
"$python" train_nora.py --config configs/demo/nora.yaml --resume auto

echo "== evaluation on episodes the training has not seen"
if [[ -e outputs/demo_nora/evaluation/summary.png ]]; then
  echo "picture: $PWD/outputs/demo_nora/evaluation/summary.png"
else
  "$python" evaluate.py --checkpoint outputs/demo_nora --data demo/insertion --output "$PWD/outputs/demo_nora/evaluation"
fi
