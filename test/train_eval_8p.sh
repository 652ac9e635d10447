#!/usr/bin/env bash
# Evaluate a checkpoint on eight devices.
#   bash test/train_eval_8p.sh --data_path=DIR --pth_path=FILE [-- flags of validate.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_options "data_path pth_path" "$@"
eval_case mAP 0/train_0_eval_8p.log -c "$ROOT/configs/ascend_eval_8p.yaml"
