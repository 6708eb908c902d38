"""Prepared datasets as the trainer sees them: their schema, their shards, the order of batches, and the VAE."""
