"""The types that models compute in, by the device that they are on."""

from contextlib import AbstractContextManager, nullcontext

import torch

# By type of device; elsewhere models compute in float32, where bfloat16 is no faster at this size.
COMPUTE_DTYPES = {"cuda": torch.bfloat16}


def autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside, a model on such a device computes matrix products in the device's compute type.

    Training and generation both run their models in it. A model that ``distribute`` laid out needs
    it: its parameters are of that type while they are used, and its inputs are not.
    """
    dtype = COMPUTE_DTYPES.get(device_type)
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype)


def exact_float32() -> AbstractContextManager[None]:
    """Inside, convolutions in float32 are exact, as matrix products are everywhere.

    Networks that metrics are computed with run in it. PyTorch lets cuDNN round what a convolution
    multiplies to the 10 bits of TF32, and features would then be those of one kind of GPU.
    """
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
