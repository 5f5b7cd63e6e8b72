"""Influence: per-example gradients contracted with validation gradients, streamed over a pool."""
