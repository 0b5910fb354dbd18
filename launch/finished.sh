#!/usr/bin/env bash
# Is the run that these flags start done? Exit code 0: yes, 75: it was stopped before its last step.
# The program saves and leaves with 0 when it gets SIGTERM, which a cluster would take for the end.
#   launch/finished.sh --config=configs/sephv14.py --workdir=/runs/sephv14
set -euo pipefail
workdir='' mode=train
for word in "$@"; do
  case $word in
    --workdir=*) workdir=${word#*=} ;;
    --mode=*) mode=${word#*=} ;;
  esac
done
[[ $mode == train ]] || exit 0
read_steps='import json, sys; print(json.load(open(sys.argv[1]))["train"]["steps"])'
steps=$(python -c "$read_steps" "$workdir/config.json" 2>/dev/null) || exit 75
[[ -e $workdir/eval/$steps/metrics.json ]] || exit 75
