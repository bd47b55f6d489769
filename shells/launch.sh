#!/usr/bin/env bash
# Run a training script on one or several GPUs:  launch.sh SCRIPT.py DEFAULT_CONFIG [flags]
#
#   --multi-gpu              one process per GPU, with torchrun
#   --num-gpus N             how many (default: $NUM_GPUS, else all); implies --multi-gpu when N > 1
#   --nnodes, --node-rank, --rdzv-*, --master-*   handed to torchrun: several machines
#   --mixed-precision M      and every other flag: handed to the script. Without --config, DEFAULT_CONFIG is used.
# Which GPUs: CUDA_VISIBLE_DEVICES, as for any program, else all. Which Python: $PYTHON, else .venv, else python3.
# SIGTERM, Ctrl-C and the end of the terminal are passed on to the training processes, which save and end; torchrun
# itself would kill them after 30 seconds.
set -euo pipefail

root="$(readlink -f "$(dirname "${BASH_SOURCE[0]}")/..")"
script="$1" default_config="$2"
shift 2

multi=false num="${NUM_GPUS:-}" config="" arguments=() torchrun=()
gpus() {  # how many; fails where there is none
  if [[ -v CUDA_VISIBLE_DEVICES ]]; then tr , '\n' <<<"$CUDA_VISIBLE_DEVICES"; else nvidia-smi -L 2>/dev/null; fi | grep -c .
}
value() { [[ $# -ge 2 ]] || { echo "launch.sh: $1 needs a value" >&2; exit 2; }; }
while (($#)); do
  case "$1" in
    --multi-gpu|--multi_gpu) multi=true ;;
    --num-gpus|--num_gpus) value "$@"; num="$2"; shift ;;
    --num-gpus=*|--num_gpus=*) num="${1#*=}" ;;
    --nnodes*|--node[-_]rank*|--rdzv[-_]*|--master[-_]*)
      multi=true
      if [[ "$1" == *=* ]]; then torchrun+=("$1"); else value "$@"; torchrun+=("$1" "$2"); shift; fi ;;
    --config) value "$@"; config="$2"; shift ;;
    --config=*) config="${1#*=}" ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[[ "$num" != all ]] || num="$(gpus)" || num=1
[[ "${num:-1}" == 1 ]] || multi=true
if [[ -n "$num" && ! "$num" =~ ^[1-9][0-9]*$ ]]; then
  echo "launch.sh: --num-gpus (or NUM_GPUS) is '$num': expected 1 or more" >&2
  exit 2
fi
if $multi && [[ -z "$num" ]]; then
  num="$(gpus)" || { echo "launch.sh: --multi-gpu found no GPU with nvidia-smi; say how many: --num-gpus N" >&2; exit 2; }
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
printf '+' >&2; printf ' %q' "${command[@]}" >&2; echo >&2
$multi || exec "${command[@]}"

set -m  # a process group of its own: the terminal's Ctrl-C reaches this shell alone, which passes it on
pass() { pkill "-$1" -P "$!" || kill "-$1" "$!" || true; }  # torchrun's children, not torchrun, where it has some
trap 'pass TERM' TERM HUP
trap 'pass INT' INT
"${command[@]}" <&0 &
while status=0; wait "$!" || status=$?; kill -0 "$!" 2>/dev/null; do :; done
exit "$status"
