"""Proxies: the closed form (IPSVD) and its baselines, ranks and sizes, compression, alignment."""
