#!/usr/bin/env bash
# Everything once, on a machine with nothing but Python: install, demo data, training, and 20 drives through scenes that
# no recording shows. CPU, no downloads of weights. Run again, it does only what is missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

echo "== demo data: 200 insertions, 300 corrections from off the path, a random SmolVLM2"
[[ -e demo/.complete ]] || {
  "$python" make_demo.py insertion_sim smolvlm2
  "$python" demo_scenes.py --scene InsertionSim --episodes 300 --out demo/insertion_sim/corrections
  touch demo/.complete
}

echo "== training SmolVLA"
"$python" train_smolvla_sim.py --config configs/demo/smolvla_sim.yaml --resume auto

echo "== does the needle go in?"
"$python" evaluate.py --checkpoint outputs/demo_smolvla_sim/checkpoints --closed-loop demo_scenes:InsertionSimDelta \
  --scenes 20 --execute 4 --output "$PWD/outputs/demo_smolvla_sim/evaluation"
