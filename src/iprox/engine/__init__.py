"""Engines that stream a pool through a scorer window by window, in this process or on Ray, and shards on disk."""
