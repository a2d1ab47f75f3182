"""A feature extractor for tests: the features of an image are its pixels."""

import functools

import torch_fidelity

from speed_engine.evaluation.features import Extractor


class Pixels(torch_fidelity.FeatureExtractorBase):
    """(N, 1, H, W) uint8 -> (N, H W) float64."""

    def __init__(self, name, features_list, **_settings):
        super().__init__(name, features_list)

    def forward(self, images):
        return (images.flatten(1).double(),)

    @staticmethod
    def get_provided_features_list():
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pixels"


@functools.cache
def extractor_of(height: int, width: int) -> Extractor:
    """Of images of one channel and this size; torch-fidelity knows it by its name."""
    name, size = f"pixels-of-{height}x{width}", height * width
    torch_fidelity.register_feature_extractor(name, Pixels)
    return Extractor(name=name, weights_sha256=f"{size:064}", feature_dim=size, channels=1)
