"""The copied share: 0.05 for images as new as held-out ones, 1 for the training set itself."""

import pytest
import torch

from speed_engine.evaluation.copies import nearest

GENERATOR = torch.Generator().manual_seed(0)
TRAINING, HELD_OUT, FRESH = torch.randn(3, 1000, 8, generator=GENERATOR)


def share(drawn, held_out=HELD_OUT):
    return nearest(drawn, TRAINING).copied_share(nearest(held_out, TRAINING))


def test_the_nearest_is_the_nearest():
    found = nearest(FRESH, TRAINING)
    truth = (FRESH[:, None] - TRAINING).double().norm(dim=2)
    assert torch.equal(found.ids, truth.argmin(1))
    assert found.distances == pytest.approx(truth.min(1).values, rel=1e-6)


def test_a_copy_is_at_no_distance():
    found = nearest(1e3 + TRAINING, 1e3 + TRAINING)
    assert (found.distances == 0).all() and torch.equal(found.ids, torch.arange(1000))


def test_new_images_are_called_copies_in_one_case_of_twenty():
    assert share(FRESH) == pytest.approx(0.05, abs=0.03)
    assert share(HELD_OUT) == pytest.approx(0.05, abs=0.002)


def test_copies_are_found_even_in_part_and_beside_held_out_duplicates():
    assert share(TRAINING) == 1.0
    assert share(torch.cat([TRAINING[:500], FRESH[:500]])) == pytest.approx(0.525, abs=0.02)
    duplicates = torch.cat([TRAINING[:100], HELD_OUT[100:]])
    assert share(TRAINING, duplicates) == 1.0 and share(FRESH, duplicates) == 0.0
