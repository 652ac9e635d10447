"""Checkpoint files: io (atomic writing, safe loading), manager (which are kept), state_dict (weights into a model)."""
