#!/usr/bin/env bash
# Measures a GPU, the most important first, each part under a limit of its own; docs/performance.md.
#
#   bash scripts/measure_gpu.sh [--parts=training,decoding]
#   bash scripts/measure_gpu.sh --device=cpu --sizes=trial    # whether it runs
set -uo pipefail
device=gpu sizes=base,big parts=training,decoding,seeds,attention
for flag in "$@"; do
  case $flag in
    --device=*) device=${flag#*=} ;;
    --sizes=*) sizes=${flag#*=} ;;
    --parts=*) parts=${flag#*=} ;;
    *) echo "$flag: the flags are --device, --sizes and --parts" >&2; exit 2 ;;
  esac
done
export PYTHONUNBUFFERED=1 COLUMNS=150
folder=$(mktemp -d) rounds=5 steps=() shape=(--dtype=bfloat16 --rows=64)
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
[ "$device" = cpu ] && export JAX_PLATFORMS=cpu rounds=1 \
  steps=(--config.steps=60 --config.log_every=20) shape=(--rows=4 --length=16)

limited() {  # seconds, then a Python program and its arguments
  echo "== ${*:2} (at most $1 s)"
  timeout -k 5 "$1" python3 "${@:2}" || echo "ended with status $?"
}
benchmark() {
  limited "$1" "$root/scripts/benchmark.py" --device="$device" --workdir="$folder" --rounds=$rounds \
    --output="$folder/benchmark.md" "${@:2}"
}
training() {  # its column `of … GFLOP/s`: the fraction of the measured rate of matrix products
  for size in ${sizes//,/ }; do
    benchmark 150 --sizes="$size" --what=training --contenders=ours,pytorch_compiled
  done
}
decoding() {
  benchmark 300 --sizes="${sizes%%,*}" --what=decoding --contenders=ours,marian,ctranslate2
}
seeds() {  # of toy_reverse: wall time, and whether 8 in one program take less than 2 times as long
  for replicas in 1 8; do
    local started=$SECONDS
    limited 120 "$root/train.py" --config="$root/configs/toy_reverse.py" "${steps[@]}" \
      --config.replicas=$replicas --workdir="$folder/$replicas"
    echo "toy_reverse, seeds: $replicas, from start to end: $((SECONDS - started)) s"
  done
  awk -v one="$(speed 1)" -v eight="$(speed 8)" \
    'BEGIN { print "time of a step, 8 seeds / 1 seed:", eight ? one / eight : "not measured" }'
}
speed() {  # the median steps per second
  sed -n 's/.*"train\/steps_per_second": \([0-9.e+-]*\).*/\1/p' "$folder/$1/metrics.jsonl" | sort -g |
    awk '{ x[NR] = $1 } END { print x[int((NR + 1) / 2)] }'
}
attention() {
  limited 90 "$root/scripts/check_attention.py" "${shape[@]}"
}
for part in ${parts//,/ }; do
  case $part in
    training | decoding | seeds | attention) "$part" ;;
    *) echo "--parts=$part: choose of training, decoding, seeds and attention" >&2; exit 2 ;;
  esac
done
