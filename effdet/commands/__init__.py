"""The command lines: train, validate, predict, and the tools for checkpoints."""

from effdet.runtime.installation import check_installation

check_installation()  # here too, as a folder that effdet overwrote has a door of effdet's
