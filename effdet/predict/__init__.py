"""A trained detector in use: load, predictor, test-time augmentation, gallery."""
