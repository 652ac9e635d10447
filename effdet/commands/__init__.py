"""The command lines: train, validate, predict, and the tools for checkpoints."""
