"""Proxies: moments, the closed form, rank budgets, compression, alignment."""
