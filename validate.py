#!/usr/bin/env python3
"""Evaluate: see effdet/commands/validate.py."""

import sys

from effdet.commands.validate import main

if __name__ == "__main__":
    sys.exit(main())
