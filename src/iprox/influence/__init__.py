"""Influence: per-example gradients of a pool contracted with validation gradients."""
