"""Hashes of weights are those that records and data sets of version 0.1 hold."""

import pytest
import torch
from torch import nn

from speed_engine.encoders.hub import load_pretrained, sha256_of, weights_hash
from speed_engine.runtime.checks import UserError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.tensor(7),
    "c": torch.tensor([True, False]),
}


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in TENSORS.items():
            self.register_buffer(name, value)


def test_hashes_are_those_of_version_0_1():
    assert sha256_of(TENSORS) == "417186f2167ec7dfe79bbbe6cb7e62aa3b899a2afe644acc382abf17a7497270"
    assert (
        weights_hash(Weights())
        == "897832e47eb1ce825ab444003d6c01f517ed67dcd9a2781f1a3b4407f5daa3a7"
    )


def test_every_part_of_a_tensor_counts_and_the_order_does_not():
    tensor = torch.arange(6, dtype=torch.bfloat16)
    variants = [
        {"a": tensor}, {"b": tensor}, {"a": tensor.view(2, 3)}, {"a": tensor.float()},
        {"a": tensor + 1}, {"a": tensor, "b": tensor},
    ]  # fmt: skip
    assert len({sha256_of(variant) for variant in variants}) == len(variants)
    assert sha256_of({"b": tensor, "a": tensor}) == sha256_of(variants[-1])
    transposed = torch.arange(6).view(3, 2).T
    assert sha256_of({"a": transposed}) == sha256_of({"a": transposed.contiguous()})


@pytest.mark.parametrize("name", ["./gone/x", "a/b/c", "/gone", "who/mistyped", "my--vae"])
def test_a_model_that_is_nowhere_is_refused_before_its_library_is_imported(
    monkeypatch, tmp_path, name
):
    def nobody(self: object, name: str, timeout: float) -> None:
        raise OSError(f"404 of {name}")

    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.HfApi, "model_info", nobody)
    (tmp_path / "slow_library.py").write_text("raise AssertionError('it is imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        load_pretrained("slow_library", "AutoencoderKL", name)
