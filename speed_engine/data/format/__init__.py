"""What lies on disk: shards, their indexes and their record; needs no torch."""
