import torch

from speed_engine.diffusion.conditions import ConditionDropout, LowResolutionNoise, hidden

SEED, IDS = torch.tensor(3), torch.arange(20_000)
NULL = {"labels": torch.tensor(10), "tokens": torch.full((2, 3), -1.0)}
TOLD = {
    "labels": torch.zeros(20_000).long(),
    "tokens": torch.zeros(20_000, 2, 3, dtype=torch.float16),
    "low_resolution": torch.zeros(20_000, 1, 2, 2),
}
TOLD_CLASS = {"labels": TOLD["labels"]}


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


def test_low_resolution_images_get_noise_of_a_told_level():
    low = torch.full((20_000, 1, 2, 2), 0.5)
    told = LowResolutionNoise(0.8)({"low_resolution": low}, SEED, IDS)
    level = told["low_resolution_noise"]
    assert 0 < float(level.min()) and float(level.max()) < 0.8
    assert abs(float(level.mean()) - 0.4) < 0.01
    share = level.view(-1, 1, 1, 1)
    noise = (told["low_resolution"] - (1 - share**2).sqrt() * low) / share
    noise = noise[level > 0.1]
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02


def test_low_resolution_noise_is_a_function_of_seed_and_image():
    low = torch.zeros(100, 1, 2, 2)
    whole = LowResolutionNoise(0.5)({"low_resolution": low}, SEED, IDS[:100])
    part = LowResolutionNoise(0.5)({"low_resolution": low[:10]}, SEED, IDS[50:60])
    for name in whole:
        assert torch.equal(part[name], whole[name][50:60])


def test_without_a_low_resolution_image_there_is_nothing_to_do():
    assert LowResolutionNoise(0.5)(TOLD_CLASS, SEED, IDS) is TOLD_CLASS
