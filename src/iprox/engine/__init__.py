"""Streaming: a pool through a scorer window by window, in this process or on Ray, to memory or to shards on disk."""
