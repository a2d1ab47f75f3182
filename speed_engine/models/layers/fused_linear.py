"""A linear map that is several in one, and says so."""

from torch import nn


class FusedLinear(nn.Linear):
    """Linear maps of one input, computed as one product: their weights lie one below the other.

    Optimizers that treat a weight as a matrix treat each of its parts as one, see
    ``training/muon.py``. In all else it is ``nn.Linear``.

    Args:
        in_features: width of the input.
        out_features: width of all answers together.
        parts: number of maps, equally wide; divides ``out_features``.
    """

    def __init__(self, in_features: int, out_features: int, parts: int) -> None:
        super().__init__(in_features, out_features)
        self.parts = parts
