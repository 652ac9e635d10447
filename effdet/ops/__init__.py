"""Computations on tensors: boxes, NMS, focal loss, labels; for accelerators, and beside each its CPU implementation."""
