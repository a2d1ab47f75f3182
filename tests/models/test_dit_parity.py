"""The DiT against one assembled from timm's layers, as the original is, and the paper's tables."""

import math
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from speed_engine.models.dit import DIT_SIZES, DiT, dit_size
from speed_engine.planning.flops import forward_flops

# Tables 1 and 4 of Peebles and Xie 2022, latents of 32 x 32 x 4: millions of parameters, and
# billions of multiply-adds, which they call Gflops.
PUBLISHED = {
    "DiT-S/8": (33, 0.36), "DiT-S/4": (33, 1.41), "DiT-S/2": (33, 6.06),
    "DiT-B/8": (131, 1.42), "DiT-B/4": (130, 5.56), "DiT-B/2": (130, 23.01),
    "DiT-L/8": (459, 5.01), "DiT-L/4": (458, 19.70), "DiT-L/2": (458, 80.71),
    "DiT-XL/8": (676, 7.39), "DiT-XL/4": (675, 29.05), "DiT-XL/2": (675, 118.64),
}  # fmt: skip


class TanhGELU(nn.GELU):
    def __init__(self) -> None:
        super().__init__(approximate="tanh")


class TimmBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads=heads, qkv_bias=True)
        self.mlp = Mlp(dim, 4 * dim, act_layer=TanhGELU)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        b1, g1, a1, b2, g2, a2 = (m[:, None] for m in self.adaLN_modulation(c).chunk(6, 1))
        x = torch.addcmul(x, a1, self.attn(torch.addcmul(b1, self.norm(x), 1 + g1)))
        return torch.addcmul(x, a2, self.mlp(torch.addcmul(b2, self.norm(x), 1 + g2)))


class TimmDiT(nn.Module):
    """With the original's names, sizes and order of things, and timm's code in the middle."""

    def __init__(self, dim: int, depth: int, heads: int, patch: int, size: int) -> None:
        super().__init__()
        self.patch, self.x_embedder = patch, PatchEmbed(size, patch, 4, dim)
        time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.t_embedder = nn.ModuleDict({"mlp": time})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(1001, dim)})
        self.blocks = nn.ModuleList(TimmBlock(dim, heads) for _ in range(depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        linear = nn.Linear(dim, patch * patch * 8)
        self.final_layer = nn.ModuleDict({"adaLN_modulation": modulation, "linear": linear})
        self.register_buffer("pos_embed", torch.zeros(1, (size // patch) ** 2, dim))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        # In float32 like the original: an exact frequency times t = 871 is another angle.
        angle = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        c = self.t_embedder["mlp"](features) + self.y_embedder["embedding_table"](y)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = (m[:, None] for m in self.final_layer["adaLN_modulation"](c).chunk(2, 1))
        patches = self.final_layer["linear"](torch.addcmul(shift, self.norm(tokens), 1 + scale))
        size, p = x.shape[-1], self.patch
        # fold wants the channel first within a patch, and patches last
        columns = patches.unflatten(2, (p * p, 8)).permute(0, 3, 2, 1).flatten(1, 2)
        return nn.functional.fold(columns, size, p, stride=p)


def pair(name: str, size: int) -> tuple[TimmDiT, DiT]:
    letter, patch = name.removeprefix("DiT-").split("/")
    dim, depth, heads = DIT_SIZES[letter]
    shape: dict[str, Any] = {"input_size": (size, size), "channels": 4, "num_classes": 1000}
    model = DiT(**shape, **dit_size(name), learn_sigma=True)
    return TimmDiT(dim, depth, heads, int(patch), size), model


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_published_figures(name, without_initialisation):
    with torch.device("meta"):
        timm, ours = pair(name, 32)
        inputs = {"x": torch.empty(1, 4, 32, 32), "t": torch.empty(1)}
        macs = forward_flops(ours, inputs | {"labels": torch.empty(1, dtype=torch.int64)}) / 2
    assert shapes(ours) == shapes(timm)
    parameters, published_macs = PUBLISHED[name]
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6) == parameters
    assert macs / 1e9 == pytest.approx(published_macs, rel=3e-4, abs=6e-3)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name, size", [("DiT-S/2", 16), ("DiT-S/4", 32)])
def test_outputs_and_gradients_are_those_of_the_assembled_one(name, size):
    torch.manual_seed(0)
    with torch.device("meta"):
        timm, ours = pair(name, size)
    ours.to_empty(device="cpu")
    for tensor in ours.state_dict().values():
        nn.init.normal_(tensor, std=0.05)
    timm.load_state_dict(ours.state_dict(), assign=True)
    inputs = torch.randn(2, 4, size, size), torch.tensor([3, 871]), torch.tensor([7, 1000])
    answer, expected = ours(*inputs), timm(*inputs)
    assert expected.abs().max() > 1
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    answer.square().sum().backward()
    expected.square().sum().backward()
    theirs = gradients(timm)
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    for parameter, gradient in gradients(ours).items():
        error = (gradient - theirs[parameter]).norm()
        assert error <= 1e-5 * theirs[parameter].norm(), parameter


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
