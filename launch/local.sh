#!/usr/bin/env bash
# Several processes on this machine, on CPU devices: to try out what a pod does.
#   launch/local.sh --config=configs/demo.py --workdir=runs/demo --config.train.batch=8
# PROCESSES (2), DEVICES of each (4) and PORT may be set in the environment.
#
# The two full COCO jobs, step for step those of 8 GPUs, only far too slow: to look at their start.
#
#   launch/local.sh --config=configs/sephv14.py --workdir=runs/sephv14 \
#     --config.data.source=tfds --config.data.data_dir=/data/tfds \
#     --config.init.format=slim --config.init.path=/data/resnet_v1_50.ckpt \
#     --config.train.batch=16 --config.optimizer.lr=0.0266667 --config.train.steps=90000 \
#     --config.schedule.warmup_steps=750 --config.eval.reference_metric=True
#
#   launch/local.sh --config=configs/sephnv15.py --workdir=runs/sephnv15 \
#     --config.data.source=tfds --config.data.data_dir=/data/tfds \
#     --config.init.format=slim --config.init.path=/data/resnet_v1_50.ckpt \
#     --config.train.batch=24 --config.optimizer.lr=0.0533333 --config.train.steps=45000 \
#     --config.schedule.warmup_steps=375 --config.eval.reference_metric=True
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || { echo 'this needs bash 5.1' >&2; exit 2; }
processes=${PROCESSES:-2}
export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=${DEVICES:-4}"
free='import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
port=${PORT:-$(python -c "$free")}

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
  python -m sephjax.main "$@" \
    --coordinator="localhost:$port" --num_processes="$processes" --process_id="$i" &
  pids+=($!)
done
# They wait for each other: when one fails the others are killed, as srun --kill-on-bad-exit does.
code=0
while ((${#pids[@]})); do
  ended='' status=0
  wait -n -p ended "${pids[@]}" || status=$?
  [[ -n ${ended:-} ]] || continue # a signal; the processes go on until they have saved
  left=()
  for pid in "${pids[@]}"; do [[ $pid == "$ended" ]] || left+=("$pid"); done
  pids=("${left[@]}")
  if ((status)); then
    ((code)) || code=$status
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
done
exit "$code"
