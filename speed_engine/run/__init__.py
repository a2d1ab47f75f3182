"""A run and its folder: start it, continue it, and read what it left."""
