#!/usr/bin/env bash
# The second part of the full training: on from the first part's last.pth.tar, in its folder, to 300 epochs and 10 of
# cooldown. From here on the learning rate follows the schedule of 300 epochs.
#   bash test/train_full_8p_121-300.sh --data_path=DIR [-- flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_options "data_path" "$@"
train_case mAP 1/train_0_8p_300.log efficientdet_d0_8p \
    -c "$ROOT/configs/ascend_8p.yaml" --epochs 300 --loss-scale 128 \
    --resume "$(run_folder efficientdet_d0_8p)/last.pth.tar"
