"""Proxies: IPSVD and its baselines, ranks and sizes, compression and alignment."""
