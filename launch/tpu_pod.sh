#!/usr/bin/env bash
# A TPU VM or a pod of them, from your machine: every command goes to all workers with gcloud.
#
#   export TPU=pod ZONE=us-west4-a         # and PROJECT, where it is not gcloud's own
#   export BUCKET=gs://mine/coco           # tfds/ and weights, copied to /data
#   export FILER=10.0.0.2:/runs            # NFS (Filestore), mounted as /runs: the shared workdir
#   launch/tpu_pod.sh install              # this checkout's commit (or REF=...) and what it needs
#   launch/tpu_pod.sh run --config=... --workdir=/runs/...
#   launch/tpu_pod.sh log                  # the last lines of each worker; sephjax.log has it all
#   launch/tpu_pod.sh stop                 # saves within train.log_every steps; `run` goes on
#
# The two full COCO jobs, on a v5litepod-8 (rates and steps scaled as in docs/RESULTS.md):
#
#   launch/tpu_pod.sh run --config=configs/sephv14.py --workdir=/runs/sephv14 \
#     --config.data.source=tfds --config.data.data_dir=/data/tfds \
#     --config.init.format=slim --config.init.path=/data/resnet_v1_50.ckpt \
#     --config.train.batch=16 --config.optimizer.lr=0.0266667 --config.train.steps=90000 \
#     --config.schedule.warmup_steps=750 --config.eval.reference_metric=True
#
#   launch/tpu_pod.sh run --config=configs/sephnv15.py --workdir=/runs/sephnv15 \
#     --config.data.source=tfds --config.data.data_dir=/data/tfds \
#     --config.init.format=slim --config.init.path=/data/resnet_v1_50.ckpt \
#     --config.train.batch=24 --config.optimizer.lr=0.0533333 --config.train.steps=45000 \
#     --config.schedule.warmup_steps=375 --config.eval.reference_metric=True
set -euo pipefail
usage='usage: TPU=<name> ZONE=<zone> launch/tpu_pod.sh install | run <flags> | log | stop'
: "${TPU:?$usage}" "${ZONE:?$usage}"
where=(--zone="$ZONE" --worker=all)
[[ -z ${PROJECT:-} ]] || where+=(--project="$PROJECT")

workers() { gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --command="$1"; }

install() {
  local tarball
  tarball=$(mktemp -d)/sephjax.tar.gz
  git archive --format=tar.gz --output="$tarball" "${REF:-HEAD}"
  gcloud compute tpus tpu-vm scp "$tarball" "$TPU:sephjax.tar.gz" "${where[@]}"
  # The image's Python may be older than 3.11: uv brings one. The last line is what JAX asks for.
  workers "set -e
    rm -rf ~/sephjax && mkdir ~/sephjax && tar -xzf ~/sephjax.tar.gz -C ~/sephjax
    python3 -m pip install --quiet --user uv
    cd ~/sephjax && python3 -m uv venv --quiet --python 3.12 ~/venv
    python3 -m uv pip install --quiet --python ~/venv/bin/python -e '.[tpu]'
    echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
  [[ -z ${BUCKET:-} ]] || workers "set -e
    sudo mkdir -p /data && sudo chmod 1777 /data
    gcloud storage rsync -r ${BUCKET@Q} /data"
  [[ -z ${FILER:-} ]] || workers "set -e
    sudo apt-get -qq install -y nfs-common && sudo mkdir -p /runs
    mountpoint -q /runs || sudo mount -t nfs ${FILER@Q} /runs
    sudo chmod 1777 /runs"
}

# A worker has no variable that tells of the others: auto makes JAX ask the metadata server.
# setsid: the run outlives the connection.
run() {
  local words
  printf -v words '%q ' python -m sephjax.main --coordinator=auto "$@"
  workers "cd ~/sephjax || exit 1
    if kill -0 \"\$(cat ~/sephjax.pid 2>/dev/null)\" 2>/dev/null; then
      echo 'a run is under way here; stop it first' >&2
      exit 1
    fi
    export PATH=~/venv/bin:\$PATH
    setsid nohup $words >> ~/sephjax.log 2>&1 < /dev/null &
    echo \$! > ~/sephjax.pid"
}

case ${1:-} in
  install) install ;;
  run) run "${@:2}" ;;
  log) workers 'hostname; tail -n 20 ~/sephjax.log' ;;
  stop) workers "kill -TERM \"\$(cat ~/sephjax.pid)\"" ;;
  *) echo "$usage" >&2; exit 2 ;;
esac
