#!/usr/bin/env bash
# The full training on eight devices: 300 epochs and 10 of cooldown, in the two parts of the original port.
#   bash run_train.sh --data_path=DIR [-- flags of train.py]
# Interrupted? In the second part (epoch 130 on), run test/train_full_8p_121-300.sh again; in the first, run
# test/train_full_8p_0-120.sh with -- --resume output/train/efficientdet_d0_8p/last.pth.tar, then the other.
set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")/test

bash "$scripts/train_full_8p_0-120.sh" "$@"
bash "$scripts/train_full_8p_121-300.sh" "$@"
