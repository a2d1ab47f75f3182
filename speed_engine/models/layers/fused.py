"""Weights that hold several maps, and say how.

Optimizers that treat a weight as a matrix treat each of its maps as one, see ``training/muon.py``.

Letters: M maps, R rows of each, n columns.
"""

from typing import NamedTuple, TypeVar

from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


class Maps(NamedTuple):
    """How the rows of a weight, split into ``sizes``, belong to maps, which ``axis`` counts."""

    sizes: tuple[int, ...]  # one of them may be -1: what the others leave
    axis: int

    def apart(self, rows: Tensor) -> Tensor:
        """(M R, n) -> (M, R, n)."""
        return rows.unflatten(0, self.sizes).movedim(self.axis, 0).flatten(1, -2)

    def together(self, maps: Tensor) -> Tensor:
        """(M, R, n) -> (M R, n), the inverse of ``apart``."""
        others = self.sizes[: self.axis] + self.sizes[self.axis + 1 :]
        return maps.unflatten(1, others).movedim(0, self.axis).flatten(0, -2)


ONE = Maps((1, -1), axis=0)  # of a weight that says nothing


def holding(maps: Maps, layer: Layer) -> Layer:
    """The layer, whose weight holds these maps."""
    layer.maps = maps  # type: ignore[assignment]
    return layer


class FusedLinear(nn.Linear):
    """Linear maps of one input, computed as one product: their weights lie one below the other.

    In all else it is ``nn.Linear``.

    Args:
        in_features: width of the input.
        out_features: width of all answers together.
        parts: number of maps, equally wide; divides ``out_features``.
    """

    def __init__(self, in_features: int, out_features: int, parts: int) -> None:
        super().__init__(in_features, out_features)
        self.maps = Maps((parts, -1), axis=0)
