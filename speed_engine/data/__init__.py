"""Shards, their deterministic order, and the loader that turns them into batches."""
