#!/usr/bin/env bash
# Fine-tune a checkpoint on one device: 900 steps of batch 16 from every tensor of it that fits, then an evaluation.
# 91 classes number COCO's categories by their ids; another count: -- --num-classes N.
#   bash test/train_finetune_1p.sh --data_path=DIR --pth_path=FILE [--device_id=N] [-- flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_options "data_path pth_path device_id" "$@"
train_case mAP "$device_id/train_${device_id}_finetune_1p.log" "$(date +%Y%m%d-%H%M%S)-finetune_1p-$device_id" \
    -c "$ROOT/configs/ascend_1p.yaml" --device-list "$device_id" --loss-scale 16 --max-steps 900 \
    --pretrained "$pth_path" --num-classes 91
