"""The network: convolution blocks, feature pyramid, and folding of batch norms."""
