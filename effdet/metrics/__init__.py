"""Metrics of detections: COCO, Pascal VOC, and an analysis of errors."""
