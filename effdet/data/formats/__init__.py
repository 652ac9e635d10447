"""Folders of annotation tools and open data sets: recognised, and converted to COCO's form in memory or on disk."""
