"""Collected predictions (base.py), and Pascal VOC's metric on plain arrays under effdet's names."""
