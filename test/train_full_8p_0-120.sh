#!/usr/bin/env bash
# The first part of the full training on eight devices: 120 epochs and 10 of cooldown. It leaves last.pth.tar in
# output/train/efficientdet_d0_8p.
#   bash test/train_full_8p_0-120.sh --data_path=DIR [-- flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_options "data_path" "$@"
train_case mAP 0/train_0_8p_120.log efficientdet_d0_8p \
    -c "$ROOT/configs/ascend_8p.yaml" --epochs 120 --loss-scale 8
