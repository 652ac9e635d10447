"""The embedded data set: `python -m effdet.data.synthetic`."""
