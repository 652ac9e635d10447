"""A training run: trainer, engine, and what they are made of."""
