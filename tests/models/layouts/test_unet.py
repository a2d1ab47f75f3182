"""U-Net weights in others' layouts, beside diffusers' own models."""

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from speed_engine.models.edm_unet import SongUNet
from speed_engine.models.layouts.unet import from_diffusers, from_edm, from_ldm
from speed_engine.models.unet import UNet

SIZE: dict[str, Any] = {
    "input_size": (16, 16), "in_channels": 3, "out_channels": 3, "model_channels": 32,
    "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,),
}  # fmt: skip
THEIRS: dict[str, Any] = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 64),
    "layers_per_block": 1, "norm_eps": 1e-5, "freq_shift": 0,
}  # fmt: skip
TIMES = torch.tensor([3, 900])


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Away from the initialisation, where outputs are zero, with activations of order one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model


def assert_same_function(ours, theirs, our_conditions, their_arguments) -> None:
    """Outputs to 1e-5, and gradients of the input and of every weight."""
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    our_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    answer = ours(our_x, TIMES, **our_conditions)
    expected = theirs(their_x, TIMES, **their_arguments).sample
    assert float(expected.detach().std()) > 0.1
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (answer * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(our_x.grad, their_x.grad, rtol=1e-4, atol=1e-4)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in from_diffusers(gradients, ours).items():
        own = ours.get_parameter(name).grad
        torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("adm", [False, True], ids=["ldm", "adm"])
def test_a_class_conditional_unet_is_that_of_diffusers(adm):
    ours = UNet(
        **SIZE, num_head_channels=16, num_classes=5, scale_shift_norm=adm, resblock_updown=adm
    )
    kind = "resnet" if adm else "conv"
    theirs = UNet2DModel(
        **THEIRS,
        attention_head_dim=16,
        attn_norm_num_groups=32,
        num_class_embeds=6,
        resnet_time_scale_shift="scale_shift" if adm else "default",
        downsample_type=kind,
        upsample_type=kind,
        down_block_types=("ResnetDownsampleBlock2D" if adm else "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D" if adm else "UpBlock2D"),
    )
    randomised(theirs)
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours))
    labels = torch.tensor([0, 5])
    assert_same_function(ours, theirs, {"labels": labels}, {"class_labels": labels})


def test_a_unet_with_tokens_is_that_of_diffusers():
    ours = UNet(**SIZE, num_heads=4, token_dim=24)
    theirs = UNet2DConditionModel(
        **THEIRS,
        attention_head_dim=4,  # the number of heads, under diffusers' historical name
        cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    randomised(theirs)
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours))
    tokens = torch.randn(2, 7, 24)
    assert_same_function(ours, theirs, {"tokens": tokens}, {"encoder_hidden_states": tokens})


def test_weights_of_another_unet_are_refused_by_name():
    ours = UNet(**SIZE)
    theirs = UNet2DModel(
        **THEIRS,
        attention_head_dim=64,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    tensors = theirs.state_dict()
    from_diffusers(tensors, ours)
    tensors["conv_somewhere.weight"] = tensors.pop("conv_in.weight")
    with pytest.raises(ValueError, match=r"missing \['conv_in.weight'\], unexpected \['conv_some"):
        from_diffusers(tensors, ours)


def test_a_checkpoint_of_latent_diffusion_loads_with_a_blank_label():
    ours = UNet(**SIZE, num_classes=5)
    theirs = {f"model.diffusion_model.{name}": value for name, value in ours.state_dict().items()}
    theirs["model.diffusion_model.label_emb.weight"] = torch.randn(5, 128)
    theirs |= {"first_stage_model.conv.weight": torch.zeros(1), "model_ema.decay": torch.zeros(())}
    ours.load_state_dict(from_ldm(theirs))
    rows = theirs["model.diffusion_model.label_emb.weight"]
    assert torch.equal(ours.label_emb.weight[:5], rows)
    assert not bool(ours.label_emb.weight[5].any())


def test_a_network_of_edm_loads_unless_its_filters_are_others():
    arguments = {"input_size": (8, 8), "in_channels": 3, "out_channels": 3, "model_channels": 16}
    ours = SongUNet(
        **arguments, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), num_classes=3
    )
    theirs = {f"model.{name}": value for name, value in ours.state_dict().items()}
    theirs["model.map_augment.weight"] = torch.randn(16, 9)
    theirs["model.enc.4x4_down.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    ours.load_state_dict(from_edm(theirs))
    theirs["model.enc.4x4_down.conv0.resample_filter"] = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match="only DDPM\\+\\+ and ADM networks can be read"):
        from_edm(theirs)
