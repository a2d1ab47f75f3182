"""From shards to batches on a device."""
