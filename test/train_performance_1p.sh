#!/usr/bin/env bash
# Speed of one device: 900 steps of batch 16, then an evaluation.
#   bash test/train_performance_1p.sh --data_path=DIR [--device_id=N] [-- flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_options "data_path device_id" "$@"
train_case perf "$device_id/train_${device_id}_1p_perf.log" "$(date +%Y%m%d-%H%M%S)-performance_1p-$device_id" \
    -c "$ROOT/configs/ascend_1p.yaml" --device-list "$device_id" --loss-scale 16 --max-steps 900
