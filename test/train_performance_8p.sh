#!/usr/bin/env bash
# Speed of eight devices: 900 steps of batch 128, then an evaluation.
#   bash test/train_performance_8p.sh --data_path=DIR [-- flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_options "data_path" "$@"
train_case perf 0/train_0_8p_perf.log "$(date +%Y%m%d-%H%M%S)-performance_8p" \
    -c "$ROOT/configs/ascend_8p.yaml" --loss-scale 128 --max-steps 900
