"""COCO annotation files: reading, checking, categories."""
