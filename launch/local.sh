#!/usr/bin/env bash
# Several processes on this machine, on CPU devices: to try out what a pod does.
#   launch/local.sh --config=configs/demo.py --workdir=runs/demo --config.train.batch=8
# PROCESSES (2), DEVICES of each (4) and PORT may be set in the environment.
set -euo pipefail
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
code=0
for pid in "${pids[@]}"; do
  # A signal interrupts wait; the process itself goes on until it has saved.
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  wait "$pid" || code=$?
done
exit "$code"
