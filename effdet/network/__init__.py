"""The network: convolution blocks, feature pyramid, heads, and folding of batch norms."""
