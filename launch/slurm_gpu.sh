#!/usr/bin/env bash
# GPU nodes under Slurm, one process a GPU: sbatch launch/slurm_gpu.sh --config=... --workdir=...
# jax.distributed gives each task of srun one GPU, the one of its SLURM_LOCALID, so one task a node
# would leave the others idle. Every task must see all GPUs of its node: no --gpus-per-task.
#
# /runs and /data are folders that all nodes share. Ten minutes before the time limit the tasks get
# SIGTERM, save, and the job queues itself again; a preempted one does where Slurm requeues. To end it:
#   scontrol update JobId=<id> Requeue=0 && scancel --signal=TERM <id>
#
# The two full COCO jobs, on 8 GPUs (rates and steps scaled as in docs/RESULTS.md); on two nodes of
# four: sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm_gpu.sh ...
#
#   sbatch launch/slurm_gpu.sh --config=configs/sephv14.py --workdir=/runs/sephv14 \
#     --config.data.source=tfds --config.data.data_dir=/data/tfds \
#     --config.init.format=slim --config.init.path=/data/resnet_v1_50.ckpt \
#     --config.train.batch=16 --config.optimizer.lr=0.0266667 --config.train.steps=90000 \
#     --config.schedule.warmup_steps=750 --config.eval.reference_metric=True
#
#   sbatch launch/slurm_gpu.sh --config=configs/sephnv15.py --workdir=/runs/sephnv15 \
#     --config.data.source=tfds --config.data.data_dir=/data/tfds \
#     --config.init.format=slim --config.init.path=/data/resnet_v1_50.ckpt \
#     --config.train.batch=24 --config.optimizer.lr=0.0533333 --config.train.steps=45000 \
#     --config.schedule.warmup_steps=375 --config.eval.reference_metric=True
#
#SBATCH --job-name=sephjax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sephjax-%j.log
set -euo pipefail
# Named, so that JAX fails where it finds no GPU; left to itself, or with cuda,cpu, it would train on
# the CPU. Slurm runs a copy of this file in the folder where sbatch was called: a checkout.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
code=0
# srun starts python itself, so that signals reach it; one task that fails ends the others.
srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
  python -m sephjax.main --coordinator=auto "$@" || code=$?
if ((code == 0)) && ! launch/finished.sh "$@"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
