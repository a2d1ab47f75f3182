"""The optimizer step, the loop around it, and its checkpoints."""
