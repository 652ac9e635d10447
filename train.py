#!/usr/bin/env python3
"""Train: see effdet/commands/train.py."""

import sys

from effdet.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
