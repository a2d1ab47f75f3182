import torch
import torch.nn.functional as F
from torch import nn

from speed_engine.models.super_resolution import SuperResolution, conditioned_channels


class Echo(nn.Module):
    """Answers what it was given."""

    def forward(self, x, t, **conditions):
        return x, t, conditions


X, T, LOW = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.randn(2, 3, 4, 4)


def test_the_smaller_image_and_its_noise_are_joined_to_the_input():
    joined, t, conditions = SuperResolution(Echo())(
        X, T, low_resolution=LOW, low_resolution_noise=torch.tensor([0.25, 0.5]), labels=T
    )
    assert joined.shape[1] == conditioned_channels(4, 3) == 8
    assert torch.equal(joined[:, :4], X)
    expected = F.interpolate(LOW, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(joined[:, 4:7], expected)
    assert torch.equal(joined[:, 7], torch.tensor([0.25, 0.5])[:, None, None].expand(2, 8, 8))
    assert t is T and list(conditions) == ["labels"]


def test_an_image_without_noise_needs_no_level():
    joined, *_ = SuperResolution(Echo())(X, T, low_resolution=LOW)
    assert bool((joined[:, 7] == 0).all())
