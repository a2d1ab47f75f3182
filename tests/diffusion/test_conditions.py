import torch

from speed_engine.diffusion.conditions import ConditionDropout, hidden

SEED, IDS = torch.tensor(3), torch.arange(20_000)
NULL = {"labels": torch.tensor(10), "tokens": torch.full((2, 3), -1.0)}
TOLD = {
    "labels": torch.zeros(20_000).long(),
    "tokens": torch.zeros(20_000, 2, 3, dtype=torch.float16),
    "low_resolution": torch.zeros(20_000, 1, 2, 2),
}


def test_an_images_label_and_text_are_hidden_together_at_the_stated_rate():
    told = ConditionDropout(NULL, 0.1)(TOLD, SEED, IDS)
    dropped = told["labels"] == 10
    assert abs(float(dropped.double().mean()) - 0.1) < 0.01
    assert bool((told["tokens"][dropped] == -1).all() and (told["tokens"][~dropped] == 0).all())
    assert told["tokens"].dtype == torch.float16 and told["labels"].dtype == torch.int64


def test_a_low_resolution_image_is_never_hidden():
    for share in (0.1, 1.0):
        told = ConditionDropout(NULL, share)(TOLD, SEED, IDS)
        assert told["low_resolution"] is TOLD["low_resolution"]
    assert hidden(TOLD, NULL)["low_resolution"] is TOLD["low_resolution"]


def test_what_is_hidden_is_a_function_of_seed_and_image():
    dropout = ConditionDropout(NULL, 0.5)
    whole = dropout(TOLD, SEED, IDS)["labels"]
    part = dropout({name: value[:50] for name, value in TOLD.items()}, SEED, IDS[100:150])["labels"]
    assert torch.equal(part, whole[100:150])


def test_guidance_hides_all_of_them():
    blank = hidden(TOLD, NULL)
    assert bool((blank["labels"] == 10).all()) and bool((blank["tokens"] == -1).all())
    assert blank["tokens"].shape == TOLD["tokens"].shape


def test_hidden_values_are_no_state():
    assert ConditionDropout(NULL, 0.5).state_dict() == {}
