#!/usr/bin/env python3
"""Detect and draw: see effdet/commands/predict.py."""

import sys

from effdet.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
