#!/usr/bin/env bash
# Step 2: train tiny-moe on the CPU with two processes, the experts divided between them. When it is
# run again it continues from the last checkpoint.
#
#   bash examples/02_train.sh [flags of pretrain_qwen35.py; they win over those below]
set -euo pipefail
run=${QWEN35_RUN_DIR:-runs/demo}
export CUDA_VISIBLE_DEVICES=                  # the same run on every machine, GPUs or not
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the processes share the cores
exec python -m qwen35_mcore.training.launch --standalone --nproc-per-node 2 "$(dirname "$0")/pretrain_qwen35.py" \
    --flavor tiny-moe --expert-model-parallel-size 2 --use-distributed-optimizer \
    --data-path "$run/data/stdlib" --split 98,1,1 --num-workers 1 \
    --seq-length 256 --micro-batch-size 8 --global-batch-size 16 --train-iters 160 \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-fraction 0.03 \
    --save "$run/checkpoints" --load "$run/checkpoints" --save-interval 100 \
    --tensorboard-dir "$run/tensorboard" --log-interval 10 --eval-interval 30 --eval-iters 4 "$@"
