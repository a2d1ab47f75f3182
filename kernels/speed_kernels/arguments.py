"""Checks of arguments that several kernels make, before any launch.

Letters: B images. A coefficient row is (a_x, a_e, b_x, b_e, w).
"""

import torch
from torch import Tensor

COEFFICIENTS = 5  # per row
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # others go through the reference


def check_address(caller: str, seed: Tensor, ids: Tensor) -> None:
    """Refuse what cannot address a draw."""
    if seed.dtype != torch.int64 or seed.shape != ():
        raise ValueError(
            f"{caller}: seed must be an int64 tensor of shape (); got {seed.dtype} of shape "
            f"{tuple(seed.shape)}. Use torch.tensor(seed)."
        )
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(
            f"{caller}: ids must be an int64 tensor of shape (B,); got {ids.dtype} of shape "
            f"{tuple(ids.shape)}."
        )
    if seed.device != ids.device:
        raise ValueError(
            f"{caller}: seed is on {seed.device} and ids on {ids.device}; move one to the other."
        )


def check_arguments(
    caller: str, x0: Tensor, coefficients: Tensor, seed: Tensor, ids: Tensor
) -> None:
    """Refuse clean data, coefficient rows and addresses that do not belong together."""
    check_address(caller, seed, ids)
    if not x0.is_floating_point():
        raise ValueError(f"{caller}: x0 must be floating point, got {x0.dtype}; scale it first.")
    if x0.dim() < 2 or ids.shape != x0.shape[:1]:
        raise ValueError(
            f"{caller}: x0 must be (B, ...) with one of B ids per image; got x0 "
            f"{tuple(x0.shape)} and ids {tuple(ids.shape)}."
        )
    if coefficients.dtype != torch.float32 or coefficients.shape != (len(x0), COEFFICIENTS):
        raise ValueError(
            f"{caller}: coefficients must be float32 of shape {(len(x0), COEFFICIENTS)}; got "
            f"{coefficients.dtype} of shape {tuple(coefficients.shape)}."
        )
    if not x0.device == coefficients.device == ids.device:
        raise ValueError(
            f"{caller}: everything must be on one device; got x0 on {x0.device}, coefficients on "
            f"{coefficients.device}, seed and ids on {ids.device}."
        )


def check_noise(caller: str, x0: Tensor, noise: Tensor | None) -> None:
    """Refuse stored noise that is not the noise of these data."""
    if noise is not None:
        same = noise.shape == x0.shape and noise.device == x0.device
        if not same or noise.dtype != torch.float32:
            raise ValueError(
                f"{caller}: stored noise must be float32 {tuple(x0.shape)} on {x0.device}, as "
                f"noised_input_and_noise returns it; got {noise.dtype} {tuple(noise.shape)} on "
                f"{noise.device}."
            )
