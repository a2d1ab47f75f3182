"""Clean images x0 from what a data set stores: gathered, drawn from a posterior, scaled, flipped.

    pixels      x0 = stored / 127.5 - 1                       stored as uint8
    latents     x0 = (mean + std noise - shift) scale         stored (mean, std) of a VAE
    otherwise   x0 = (stored - shift) scale                   stored as floating point

A flip mirrors the width of what is stored, by one bit per image; the noise is not mirrored, which
makes no difference to its law. Of latents a flip is an approximation: the decoder of a mirrored
latent is only nearly the mirrored image. Bit and noise are functions of (seed, image counter), so
an image of a run is the same whether it came by a loader or from rows of a resident data set.
Fused and reference agree bit for bit.

Letters: N stored images, B of a batch, C channels, H, W; a posterior has 2C stored channels.
Traffic, in bytes per element of x0: reads the stored bytes (pixels 1, float16 posterior 4; under a
flip in single elements, of lines that the cache then holds), writes 4. The noised input reads those
4 again; doing both at once would save them and be a kernel more, while a training step moves
thousands of bytes per element.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from speed_kernels.arguments import check_address
from speed_kernels.language import chunk, multiply, runs_kernels, tl, triton
from speed_kernels.philox import (
    BLOCK,
    Stream,
    consecutive_normals,
    normal,
    random_bits,
)

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_POSTERIOR = tl.constexpr(int(Stream.LATENT_POSTERIOR))


def clean_images_reference(
    stored: Tensor,
    seed: Tensor,
    ids: Tensor,
    rows: Tensor | None = None,
    *,
    posterior: bool = False,
    scale: float = 1.0,
    shift: float = 0.0,
    flip: bool = False,
) -> Tensor:
    """The definition of ``clean_images`` in plain PyTorch."""
    x0 = stored if rows is None else stored[rows]
    if flip:
        x0 = torch.where(flips(seed, ids).view(-1, 1, 1, 1), x0.flip(-1), x0)
    if stored.dtype == torch.uint8:
        return from_pixels(x0)
    x0 = x0.to(torch.float32)
    if posterior:
        mean, std = x0.chunk(2, dim=1)
        noise = normal(seed, ids, mean.shape[1:].numel(), Stream.LATENT_POSTERIOR)
        x0 = mean + std * noise.view(mean.shape)
    return x0 if (scale, shift) == (1, 0) else (x0 - shift) * scale


def clean_images(
    stored: Tensor,
    seed: Tensor,
    ids: Tensor,
    rows: Tensor | None = None,
    *,
    posterior: bool = False,
    scale: float = 1.0,
    shift: float = 0.0,
    flip: bool = False,
) -> Tensor:
    """Images as the objective takes them; no gradient.

    Args:
        stored: (N, C, H, W), or (N, 2C, H, W) of a posterior, mean then standard deviation; uint8
            pixels, float16, bfloat16 or float32. Copied first if not contiguous.
        seed: () int64.
        ids: (B,) int64 image counters, the address of bit and noise.
        rows: (B,) int64 in [0, N), the stored image of each; None takes all in turn, N = B. The
            range is not checked, which would wait for the device.
        posterior: whether to draw from the stored distribution.
        scale: factor that brings latents to unit variance; 1 for pixels.
        shift: subtracted before; 0 for pixels.
        flip: whether to mirror one image in two.

    Returns:
        (B, C, H, W) float32; ``stored`` itself where there is nothing to do.
    """
    _check(stored, seed, ids, rows, posterior, scale, shift)
    if stored.dtype == torch.float32 and rows is None and not posterior and not flip:
        if (scale, shift) == (1, 0):
            return stored
    if not runs_kernels(stored):
        return clean_images_reference(
            stored, seed, ids, rows, posterior=posterior, scale=scale, shift=shift, flip=flip
        )
    return _clean_images(stored, seed, ids, rows, posterior, scale, shift, flip)


def from_pixels(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]: the definition, for what is no batch of images."""
    # By a tensor: CUDA multiplies by a number's reciprocal.
    return pixels.to(torch.float32) / torch.full((), 127.5, device=pixels.device) - 1


def flips(seed: Tensor, ids: Tensor) -> Tensor:
    """(B,) bool, which images are mirrored."""
    return random_bits(seed, ids, 1, Stream.FLIP)[:, 0] >= 2**31


def _check(
    stored: Tensor,
    seed: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    posterior: bool,
    scale: float,
    shift: float,
) -> None:
    check_address("clean_images", seed, ids)
    if stored.dim() != 4 or stored.dtype not in DTYPES:
        raise ValueError(
            f"clean_images: stored must be (N, C, H, W), uint8, float16, bfloat16 or float32; got "
            f"{stored.dtype} {tuple(stored.shape)}."
        )
    if posterior and (stored.dtype == torch.uint8 or stored.shape[1] % 2):
        raise ValueError(
            f"clean_images: a posterior is stored as floating point (N, 2C, H, W), mean then "
            f"standard deviation; got {stored.dtype} {tuple(stored.shape)}."
        )
    if stored.dtype == torch.uint8 and (scale, shift) != (1, 0):
        raise ValueError(
            f"clean_images: scale={scale} and shift={shift} are for latents, but what is stored is "
            f"uint8 pixels; leave them at 1 and 0."
        )
    if rows is not None and (rows.dtype != torch.int64 or rows.shape != ids.shape):
        raise ValueError(
            f"clean_images: rows must be int64 of the shape of ids, {tuple(ids.shape)}; got "
            f"{rows.dtype} {tuple(rows.shape)}."
        )
    if rows is None and len(stored) != len(ids):
        raise ValueError(
            f"clean_images: {len(stored)} stored images for {len(ids)} ids; give rows to gather."
        )
    devices = {tensor.device for tensor in (stored, ids, *(() if rows is None else (rows,)))}
    if len(devices) > 1:
        raise ValueError(
            f"clean_images: everything must be on one device; got {sorted(map(str, devices))}."
        )


# One program per image and BLOCK elements of x0.


@triton.jit
def _clean_images_kernel(
    stored_ptr, seed_ptr, ids_ptr, rows_ptr, flips_ptr, x0_ptr,
    num_elements, num_chunks, width, scale, shift,
    POSTERIOR: tl.constexpr, PIXELS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, first, offset = chunk(tl.program_id(0), num_elements, num_chunks, BLOCK)
    elements = tl.arange(0, BLOCK)
    mask = first + elements < num_elements
    if rows_ptr is None:
        row = image
    else:
        row = tl.load(rows_ptr + image)
    image_ptr = stored_ptr + row * num_elements * (2 if POSTERIOR else 1) + first
    source = elements
    if flips_ptr is not None:
        if tl.load(flips_ptr + image) != 0:
            column = ((first % width).to(tl.int32) + elements) % width
            source = elements + width - 1 - 2 * column

    x0 = tl.load(image_ptr + source, mask=mask, other=0).to(tl.float32)
    if PIXELS:
        x0 = tl.div_rn(x0, 127.5) - 1.0
    if POSTERIOR:
        std = tl.load(image_ptr + num_elements + source, mask=mask, other=0).to(tl.float32)
        seed, counter = tl.load(seed_ptr), tl.load(ids_ptr + image)
        noise = consecutive_normals(seed, first, counter, _POSTERIOR, BLOCK)
        x0 = x0 + multiply(std, noise)
    if SCALED:
        x0 = multiply(x0 - shift, tl.zeros((BLOCK,), tl.float32) + scale)
    tl.store(x0_ptr + offset + elements, x0, mask=mask)


@custom_op("speed_kernels::clean_images", mutates_args=())
def _clean_images(
    stored: Tensor,
    seed: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    posterior: bool,
    scale: float,
    shift: float,
    flip: bool,
) -> Tensor:
    stored, ids = stored.contiguous(), ids.contiguous()
    rows = None if rows is None else rows.contiguous()
    mirrored = flips(seed, ids).view(torch.uint8) if flip else None
    x0 = torch.empty(_shape(stored, ids, posterior), dtype=torch.float32, device=stored.device)
    if x0.numel():
        num_elements = x0.shape[1:].numel()
        num_chunks = -(-num_elements // BLOCK)
        with torch.cuda.device_of(stored):
            _clean_images_kernel[(len(ids) * num_chunks,)](
                stored, seed, ids, rows, mirrored, x0,
                num_elements, num_chunks, stored.shape[3], scale, shift,
                POSTERIOR=posterior, PIXELS=stored.dtype == torch.uint8,
                SCALED=(scale, shift) != (1, 0), BLOCK=BLOCK,
            )  # fmt: skip
    return x0


@_clean_images.register_fake
def _(stored, seed, ids, rows, posterior, scale, shift, flip):
    return stored.new_empty(_shape(stored, ids, posterior), dtype=torch.float32)


def _shape(stored: Tensor, ids: Tensor, posterior: bool) -> tuple[int, ...]:
    channels = stored.shape[1] // 2 if posterior else stored.shape[1]
    return len(ids), channels, *stored.shape[2:]
