"""What is wrong with shards."""

from speed_engine.runtime.checks import UserError


class ShardError(UserError):
    """A shard or its index is damaged or unusable; the message names the file and the reason."""
