"""Corpora: from sources to hashed shards on disk, and from shards to batches of windows."""
