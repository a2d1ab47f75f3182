"""Counter-based randomness: a draw is a pure function of (seed, image counter, stream, element).

    words[4j : 4j+4] = Philox4x32-10(key = seed as 2 x 32 bits, counter = (j, id_lo, id_hi, stream))
    normals          = Box-Muller on consecutive pairs (x0, x1), (x2, x3) of those words

Specification 1, frozen: resumed runs, other world sizes and other devices rely on these bits. Only
integer operations, exact conversions, IEEE additions and multiplications (never contracted to an
FMA) and a correctly rounded square root appear, so that any backend can reproduce it bit for bit;
log, sin and cos are the polynomials below, after an exact integer range reduction.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).

Letters: B images, W 32-bit words or normals per image. ids are int64 counters of images consumed by
the run, unique across ranks and epochs, so noise never repeats.
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

SPECIFICATION = 1


class Stream(IntEnum):
    """What a draw is for; streams of one image are independent of each other. Values are frozen."""

    NOISE = 0
    TIMESTEP = 1
    LATENT_POSTERIOR = 2
    LABEL_DROPOUT = 3
    FLIP = 4
    ORDER = 5
    GENERATION = 6
    SOLVER = 7


_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# ln(1 + f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1], P lowest power first.
_LOG = (
    0.33333316445350647, -0.25000810623168945, 0.2000228613615036, -0.16624553501605988,
    0.14181192219257355, -0.13128754496574402, 0.12881647050380707, -0.07859611511230469,
)  # fmt: skip
# sin and cos of (pi/2) v on [-1/2, 1/2] as polynomials in v^2, lowest power first.
_SIN = (1.5707963705062866, -0.6459634900093079, 0.07968022674322128, -0.004602177068591118)
_COS = (
    1.0, -1.2337005138397217, 0.25366920232772827, -0.02086007222533226, 0.0009036316769197583,
)  # fmt: skip
_LN2_HIGH = 0.693359375  # 9 significant bits: exponent * _LN2_HIGH is exact
_LN2_LOW = -2.12194440e-4
_SQRT_HALF_BITS = 0x3F3504F3
_2_POW_MINUS_32 = 2.0**-32
_2_POW_MINUS_33 = 2.0**-33


def random_bits(seed: Tensor, ids: Tensor, num_words: int, stream: Stream) -> Tensor:
    """Uniform 32-bit words.

    Args:
        seed: () int64.
        ids: (B,) int64 image counters.
        num_words: W, words per image.
        stream: what the words are for.

    Returns:
        (B, W) int64 in [0, 2**32), on the device of ``ids``.
    """
    return _random_bits(seed, ids, num_words, int(stream))


def normal(seed: Tensor, ids: Tensor, num_elements: int, stream: Stream = Stream.NOISE) -> Tensor:
    """Standard normals; arguments as in ``random_bits``.

    Returns:
        (B, W) float32 on the device of ``ids``; the largest possible magnitude is 6.77.
    """
    return _normal(seed, ids, num_elements, int(stream))


# PyTorch reference, on any device.


def random_bits_reference(seed: Tensor, ids: Tensor, num_words: int, stream: int) -> Tensor:
    """The definition of ``random_bits`` in plain PyTorch."""
    words = _philox_reference(seed, ids, num_words, stream)
    return torch.stack(words, dim=-1).flatten(1)[:, :num_words]


def normal_reference(seed: Tensor, ids: Tensor, num_elements: int, stream: int) -> Tensor:
    """The definition of ``normal`` in plain PyTorch."""
    x0, x1, x2, x3 = _philox_reference(seed, ids, num_elements, stream)
    normals = [*_box_muller_reference(x0, x1), *_box_muller_reference(x2, x3)]
    return torch.stack(normals, dim=-1).flatten(1)[:, :num_elements]


def _philox_reference(seed: Tensor, ids: Tensor, num_words: int, stream: int) -> list[Tensor]:
    """Four (B, ceil(W / 4)) int64 tensors of 32-bit words."""
    blocks = torch.arange(-(-num_words // 4), device=ids.device)
    zero = torch.zeros((len(ids), len(blocks)), dtype=torch.int64, device=ids.device)
    low, high = ids[:, None] & _MASK, (ids[:, None] >> 32) & _MASK
    counter = [zero + blocks, zero + low, zero + high, zero + stream]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_reference(_MULTIPLIERS[0], counter[0])
        high1, low1 = _multiply_reference(_MULTIPLIERS[1], counter[2])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(k + step) & _MASK for k, step in zip(key, _KEY_INCREMENTS, strict=True)]
    return counter


def _multiply_reference(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; halves of b keep it inside a signed int64."""
    low_product = (b & 0xFFFF) * a
    middle = (b >> 16) * a + (low_product >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_product & 0xFFFF)


def _box_muller_reference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    # float32 sqrt is not correctly rounded on every CPU; through float64 it is.
    radius = _minus_2_log_reference(x).double().sqrt().float()
    cos, sin = _cos_sin_reference(y)
    return radius * cos, radius * sin


def _minus_2_log_reference(x: Tensor) -> Tensor:
    """-2 ln((x + 1/2) / 2**32) for 32-bit words x."""
    bits = (x.float() * _2_POW_MINUS_32 + _2_POW_MINUS_33).view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    exponent = exponent.float()
    p = torch.full_like(f, _LOG[-1])
    for coefficient in reversed(_LOG[:-1]):
        p = p * f + coefficient
    f2 = f * f
    log = f2 * f * p + exponent * _LN2_LOW - f2 * 0.5 + f + exponent * _LN2_HIGH
    return log * -2.0


def _cos_sin_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angle 2 pi x / 2**32: the top two bits are the quadrant."""
    fraction = (x << 2) & _MASK
    v = torch.where(fraction >= 2**31, fraction - 2**32, fraction).float() * _2_POW_MINUS_32
    z = v * v
    sin, cos = torch.full_like(z, _SIN[-1]), torch.full_like(z, _COS[-1])
    for coefficient in reversed(_SIN[:-1]):
        sin = sin * z + coefficient
    for coefficient in reversed(_COS[:-1]):
        cos = cos * z + coefficient
    sin = sin * v
    swap, negate = (x & 0x40000000) != 0, (x & 0x80000000) != 0
    cos, sin = torch.where(swap, -sin, cos), torch.where(swap, cos, sin)
    return torch.where(negate, -cos, cos), torch.where(negate, -sin, sin)


# NumPy, the CPU path: the same bits about a hundred times faster than the int64 emulation above.


def _philox_numpy(seed: int, ids: np.ndarray, num_words: int, stream: int) -> list[np.ndarray]:
    blocks = np.arange(-(-num_words // 4), dtype=np.uint64)
    zero = np.zeros((len(ids), len(blocks)), dtype=np.uint64)
    mask, shift = np.uint64(_MASK), np.uint64(32)
    ids = ids.astype(np.uint64)[:, None]
    counter = [zero + blocks, zero + (ids & mask), zero + (ids >> shift), zero + np.uint64(stream)]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(_ROUNDS):
        product0 = counter[0] * np.uint64(_MULTIPLIERS[0])
        product1 = counter[2] * np.uint64(_MULTIPLIERS[1])
        counter = [
            (product1 >> shift) ^ counter[1] ^ np.uint64(key[0]),
            product1 & mask,
            (product0 >> shift) ^ counter[3] ^ np.uint64(key[1]),
            product0 & mask,
        ]
        key = [(k + step) & _MASK for k, step in zip(key, _KEY_INCREMENTS, strict=True)]
    return counter


def _box_muller_numpy(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = np.sqrt(_minus_2_log_numpy(x))
    cos, sin = _cos_sin_numpy(y)
    return radius * cos, radius * sin


def _minus_2_log_numpy(x: np.ndarray) -> np.ndarray:
    f32 = np.float32
    bits = (x.astype(f32) * f32(_2_POW_MINUS_32) + f32(_2_POW_MINUS_33)).view(np.int32)
    exponent = (bits - np.int32(_SQRT_HALF_BITS)) >> np.int32(23)
    f = (bits - (exponent << np.int32(23))).view(f32) - f32(1)
    exponent = exponent.astype(f32)
    p = np.full_like(f, f32(_LOG[-1]))
    for coefficient in reversed(_LOG[:-1]):
        p = p * f + f32(coefficient)
    f2 = f * f
    log = f2 * f * p + exponent * f32(_LN2_LOW) - f2 * f32(0.5) + f + exponent * f32(_LN2_HIGH)
    return log * f32(-2)


def _cos_sin_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f32 = np.float32
    word = x.astype(np.uint32)
    v = (word << np.uint32(2)).view(np.int32).astype(f32) * f32(_2_POW_MINUS_32)
    z = v * v
    sin, cos = np.full_like(z, f32(_SIN[-1])), np.full_like(z, f32(_COS[-1]))
    for coefficient in reversed(_SIN[:-1]):
        sin = sin * z + f32(coefficient)
    for coefficient in reversed(_COS[:-1]):
        cos = cos * z + f32(coefficient)
    sin = sin * v
    swap, negate = (word & 0x40000000) != 0, (word & 0x80000000) != 0
    cos, sin = np.where(swap, -sin, cos), np.where(swap, cos, sin)
    return np.where(negate, -cos, cos), np.where(negate, -sin, sin)


# Operators: opaque to torch.compile, which would spend 40 s on the decomposed integer arithmetic.


@custom_op("speed_kernels::random_bits", mutates_args=())
def _random_bits(seed: Tensor, ids: Tensor, num_words: int, stream: int) -> Tensor:
    return random_bits_reference(seed, ids, num_words, stream)


@_random_bits.register_kernel("cpu")
def _(seed: Tensor, ids: Tensor, num_words: int, stream: int) -> Tensor:
    words = _philox_numpy(int(seed), ids.numpy(), num_words, stream)
    bits = np.stack(words, axis=-1).reshape(len(ids), words[0].shape[1] * 4)
    return torch.from_numpy(np.ascontiguousarray(bits[:, :num_words].astype(np.int64)))


@_random_bits.register_fake
def _(seed: Tensor, ids: Tensor, num_words: int, stream: int) -> Tensor:
    return ids.new_empty((len(ids), num_words))


@custom_op("speed_kernels::normal", mutates_args=())
def _normal(seed: Tensor, ids: Tensor, num_elements: int, stream: int) -> Tensor:
    return normal_reference(seed, ids, num_elements, stream)


@_normal.register_kernel("cpu")
def _(seed: Tensor, ids: Tensor, num_elements: int, stream: int) -> Tensor:
    x0, x1, x2, x3 = _philox_numpy(int(seed), ids.numpy(), num_elements, stream)
    normals = np.stack([*_box_muller_numpy(x0, x1), *_box_muller_numpy(x2, x3)], axis=-1)
    flat = normals.reshape(len(ids), x0.shape[1] * 4)
    return torch.from_numpy(np.ascontiguousarray(flat[:, :num_elements]))


@_normal.register_fake
def _(seed: Tensor, ids: Tensor, num_elements: int, stream: int) -> Tensor:
    return ids.new_empty((len(ids), num_elements), dtype=torch.float32)
