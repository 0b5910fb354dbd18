#!/usr/bin/env bash
# One machine with several GPUs: one process sees them all and cuts each batch over them.
# CUDA_VISIBLE_DEVICES=0,1 takes some of them. The same command resumes.
#
# The two full COCO jobs, on 8 GPUs (rates and steps scaled as in docs/RESULTS.md):
#
#   launch/gpu_node.sh --config=configs/sephv14.py --workdir=/runs/sephv14 \
#     --config.data.source=tfds --config.data.data_dir=/data/tfds \
#     --config.init.format=slim --config.init.path=/data/resnet_v1_50.ckpt \
#     --config.train.batch=16 --config.optimizer.lr=0.0266667 --config.train.steps=90000 \
#     --config.schedule.warmup_steps=750 --config.eval.reference_metric=True
#
#   launch/gpu_node.sh --config=configs/sephnv15.py --workdir=/runs/sephnv15 \
#     --config.data.source=tfds --config.data.data_dir=/data/tfds \
#     --config.init.format=slim --config.init.path=/data/resnet_v1_50.ckpt \
#     --config.train.batch=24 --config.optimizer.lr=0.0533333 --config.train.steps=45000 \
#     --config.schedule.warmup_steps=375 --config.eval.reference_metric=True
set -euo pipefail
# Named, so that JAX fails where it finds no GPU; left to itself, or with cuda,cpu, it would train on
# the CPU.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
# No XLA_FLAGS: none was measured to help here.
# An interactive Slurm allocation says SLURM_NTASKS, which would be taken for several processes.
exec env -u SLURM_NTASKS python -m sephjax.main "$@"
