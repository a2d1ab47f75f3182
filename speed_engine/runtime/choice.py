"""A choice that was made for a run, with its reason."""

from typing import NamedTuple


class Choice(NamedTuple):
    """A decision and its reason."""

    value: str
    reason: str
