"""Other data sets' formats, converted to COCO's in memory or on disk."""
