#!/usr/bin/env bash
# Run a training script on one or several GPUs:  launch.sh SCRIPT.py DEFAULT_CONFIG [flags]
#
#   --multi-gpu              one process per GPU, with torchrun
#   --num-gpus N             how many (default: $NUM_GPUS, else all that nvidia-smi lists); implies --multi-gpu when N > 1
#   --nnodes, --node-rank, --rdzv-*, --master-*   handed to torchrun: several machines
#   --mixed-precision M      and every other flag: handed to the script. Without --config, DEFAULT_CONFIG is used.
# Which GPUs: CUDA_VISIBLE_DEVICES, as for any program. Which Python: $PYTHON, else .venv, else python3.
# SIGTERM and Ctrl-C are passed on to the training processes, which save and end; torchrun itself would kill them after
# 30 seconds.
set -euo pipefail

here="$PWD"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
script="$1" default_config="$2"
shift 2

multi=false num="${NUM_GPUS:-}" config="" arguments=() torchrun=()
[[ -z "$num" || "$num" == 1 ]] || multi=true
value() { [[ $# -ge 2 ]] || { echo "launch.sh: $1 needs a value" >&2; exit 2; }; }
while (($#)); do
  case "$1" in
    --multi-gpu|--multi_gpu) multi=true ;;
    --num-gpus|--num_gpus) value "$@"; num="$2"; [[ "$2" == 1 ]] || multi=true; shift ;;
    --num-gpus=*|--num_gpus=*) num="${1#*=}"; [[ "$num" == 1 ]] || multi=true ;;
    --nnodes|--node-rank|--rdzv-*|--master-*)
      multi=true
      if [[ "$1" == *=* ]]; then torchrun+=("$1"); else value "$@"; torchrun+=("$1" "$2"); shift; fi ;;
    --nnodes=*|--node-rank=*) multi=true; torchrun+=("$1") ;;
    --config) value "$@"; config="$2"; shift ;;
    --config=*) config="${1#*=}" ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
if [[ -n "$num" && ! "$num" =~ ^[1-9][0-9]*$ ]]; then
  echo "launch.sh: --num-gpus (or NUM_GPUS) is '$num': expected 1 or more" >&2
  exit 2
fi
if $multi && [[ -z "$num" ]]; then
  num="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)"
  ((num > 0)) || { echo "launch.sh: --multi-gpu found no GPU with nvidia-smi; say how many: --num-gpus N" >&2; exit 2; }
fi
((${#torchrun[@]})) || torchrun=(--standalone)
[[ -n "$config" ]] || config="$root/$default_config"

python="${PYTHON:-$root/.venv/bin/python}"
[[ -x "$python" ]] || python="$(command -v "$python" || command -v python3)"
command=("$python")
if $multi; then
  threads=$(($(nproc) / num))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-7200}"  # seconds, where torchrun is signalled
  command+=(-m torch.distributed.run "${torchrun[@]}" --nproc-per-node "$num")
fi
command+=("$root/$script" --config "$config" ${arguments[@]+"${arguments[@]}"})
cd "$here"
printf '+' >&2; printf ' %q' "${command[@]}" >&2; echo >&2
$multi || exec "${command[@]}"

set -m  # a process group of its own: the terminal's Ctrl-C reaches this shell alone, which passes it on
"${command[@]}" <&0 &
pass() { pkill "-$1" -P "$agent" || kill "-$1" "$agent" || true; }  # torchrun's children, not torchrun, where it has some
agent=$!
trap 'pass TERM' TERM
trap 'pass INT' INT
while status=0; wait "$agent" || status=$?; kill -0 "$agent" 2>/dev/null; do :; done
exit "$status"
