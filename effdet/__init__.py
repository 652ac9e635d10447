"""EfficientDet in PyTorch: models, anchors, loss, post-processing, data and evaluation."""
