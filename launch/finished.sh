#!/usr/bin/env bash
# Is the run that these flags start done? Exit code 0: yes, 75: it was stopped before its last step.
# The program saves and leaves with 0 when it gets SIGTERM, which a cluster would take for the end.
#   launch/finished.sh --config=configs/sephv14.py --workdir=/runs/sephv14
set -euo pipefail
workdir='' mode=train before=''
for word in "$@"; do # --flag=value or --flag value, with one dash or two, as absl takes them
  case ${before#-} in
    -workdir | workdir) workdir=$word ;;
    -mode | mode) mode=$word ;;
  esac
  before=''
  case ${word#-} in
    -workdir=* | workdir=*) workdir=${word#*=} ;;
    -mode=* | mode=*) mode=${word#*=} ;;
    -workdir | workdir | -mode | mode) before=$word ;;
  esac
done
[[ -n $workdir ]] || { echo 'finished.sh: --workdir is missing' >&2; exit 2; }
[[ $mode == train ]] || exit 0
read_steps='import json, sys; print(json.load(open(sys.argv[1]))["train"]["steps"])'
steps=$(python -c "$read_steps" "$workdir/config.json" 2>/dev/null) || exit 75
# A run that was trained further before train.steps was lowered is done too.
for file in "$workdir"/eval/*/metrics.json; do
  at=${file%/metrics.json} at=${at##*/}
  [[ $at =~ ^[0-9]+$ ]] && ((at >= steps)) && exit 0
done
exit 75
