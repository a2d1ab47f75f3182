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

from speed_kernels.arguments import check_address
from speed_kernels.language import HAS_TRITON, chunk, multiply, store, tl, triton

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
    LOW_RESOLUTION_LEVEL = 8
    LOW_RESOLUTION_NOISE = 9
    TOKEN_MASK = 10
    DROPOUT = 11


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

BLOCK = 1024  # elements per program of 4 warps; not tuned on a GPU


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
    check_address("random_bits", seed, ids)
    return _random_bits(seed, ids, num_words, int(stream))


def normal(seed: Tensor, ids: Tensor, num_elements: int, stream: Stream = Stream.NOISE) -> Tensor:
    """Standard normals; arguments as in ``random_bits``.

    Returns:
        (B, W) float32 on the device of ``ids``; the largest possible magnitude is 6.77.
    """
    check_address("normal", seed, ids)
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
    return _rounds_reference(counter, [seed & _MASK, (seed >> 32) & _MASK])


def _rounds_reference(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
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
    """(cos, sin) of pi / 2 (q + v): q is the top two bits of x, v in [-1/2, 1/2) the signed others.

    That is 2 pi x / 2**32, less a quarter turn where the others are 2**29 or more: as uniform.
    """
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
    return _rounds_numpy(counter, [seed & _MASK, (seed >> 32) & _MASK])


def _rounds_numpy(counter: list[np.ndarray], key: list[int]) -> list[np.ndarray]:
    mask, shift = np.uint64(_MASK), np.uint64(32)
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


# Triton, the CUDA path: the same bits again.

_LOG_COEFFICIENTS, _SIN_COEFFICIENTS, _COS_COEFFICIENTS = map(tl.constexpr, (_LOG, _SIN, _COS))
_LN2_HIGH_PART, _LN2_LOW_PART = tl.constexpr(_LN2_HIGH), tl.constexpr(_LN2_LOW)
_SQRT_HALF = tl.constexpr(_SQRT_HALF_BITS)
_NOISE = tl.constexpr(int(Stream.NOISE))
_SCALE, _HALF_STEP = tl.constexpr(_2_POW_MINUS_32), tl.constexpr(_2_POW_MINUS_33)


@triton.jit
def random_words(seed, blocks, image, STREAM: tl.constexpr):
    """Words 4j, 4j + 1, 4j + 2 and 4j + 3 of one image for blocks j, as uint32.

    seed and image are int64 scalars, blocks is an integer tensor.
    """
    block = blocks.to(tl.uint32)
    zero = block * 0
    low = (image & 0xFFFFFFFF).to(tl.uint32)
    high = ((image >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, block, zero + low, zero + high, zero + STREAM)


@triton.jit
def four_normals(seed, blocks, image, STREAM: tl.constexpr):
    """Normals 4j, 4j + 1, 4j + 2 and 4j + 3 of one image for blocks j, as float32."""
    x0, x1, x2, x3 = random_words(seed, blocks, image, STREAM)
    radius0, radius1 = tl.sqrt_rn(_minus_2_log(x0)), tl.sqrt_rn(_minus_2_log(x2))
    cos0, sin0 = _cos_sin(x1)
    cos1, sin1 = _cos_sin(x3)
    return (
        multiply(radius0, cos0), multiply(radius0, sin0),
        multiply(radius1, cos1), multiply(radius1, sin1),
    )  # fmt: skip


@triton.jit
def consecutive_normals(seed, first, image, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) normals of one image from element ``first`` on, a multiple of four.

    Each thread holds runs of four neighbours, so what it loads and stores beside them is 16 bytes.
    """
    blocks = first // 4 + tl.arange(0, BLOCK // 4)
    n0, n1, n2, n3 = four_normals(seed, blocks, image, STREAM)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def noise_of_chunk(noise_ptr, seed_ptr, ids_ptr, image, first, offset, mask, BLOCK: tl.constexpr):
    """(BLOCK,) float32, read where the noise was stored, else drawn."""
    if noise_ptr is None:
        return consecutive_normals(
            tl.load(seed_ptr), first, tl.load(ids_ptr + image), _NOISE, BLOCK
        )
    else:
        return tl.load(noise_ptr + offset + tl.arange(0, BLOCK), mask=mask, other=0.0)


@triton.jit
def _minus_2_log(x):
    bits = (multiply(x.to(tl.float32), _SCALE) + _HALF_STEP).to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    exponent = exponent.to(tl.float32)
    f2 = multiply(f, f)
    log = multiply(multiply(f2, f), _polynomial(f, _LOG_COEFFICIENTS, 8))
    log = log + multiply(exponent, _LN2_LOW_PART)
    log = log - multiply(f2, 0.5)
    log = log + f
    log = log + multiply(exponent, _LN2_HIGH_PART)
    return multiply(log, -2.0)


@triton.jit
def _cos_sin(x):
    v = multiply((x << 2).to(tl.int32, bitcast=True).to(tl.float32), _SCALE)
    z = multiply(v, v)
    sin = multiply(_polynomial(z, _SIN_COEFFICIENTS, 4), v)
    cos = _polynomial(z, _COS_COEFFICIENTS, 5)
    swap = (x & 0x40000000) != 0
    # Signs flip by bits: Triton's unary minus is 0 - x, which has another zero.
    cos, sin = (
        _flip_sign(tl.where(swap, sin, cos), x ^ (x << 1)),
        _flip_sign(tl.where(swap, cos, sin), x),
    )
    return cos, sin


@triton.jit
def _flip_sign(value, word):
    sign = (word & 0x80000000).to(tl.int32, bitcast=True)
    return (value.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr):
    value = multiply(x, COEFFICIENTS[COUNT - 1]) + COEFFICIENTS[COUNT - 2]
    for i in tl.static_range(3, COUNT + 1):
        value = multiply(value, x) + COEFFICIENTS[COUNT - i]
    return value


@triton.jit
def _random_bits_kernel(
    out_ptr, seed_ptr, ids_ptr, num_words, num_chunks, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    image, first, offset = chunk(tl.program_id(0), num_words, num_chunks, BLOCK)
    seed, counter = tl.load(seed_ptr), tl.load(ids_ptr + image)
    blocks = first // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = random_words(seed, blocks, counter, STREAM)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int64)
    elements = tl.arange(0, BLOCK)
    tl.store(out_ptr + offset + elements, words, mask=first + elements < num_words)


@triton.jit
def _normal_kernel(
    out_ptr, seed_ptr, ids_ptr, num_elements, num_chunks, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    image, first, offset = chunk(tl.program_id(0), num_elements, num_chunks, BLOCK)
    seed, counter = tl.load(seed_ptr), tl.load(ids_ptr + image)
    normals = consecutive_normals(seed, first, counter, STREAM, BLOCK)
    elements = tl.arange(0, BLOCK)
    store(out_ptr + offset + elements, normals, mask=first + elements < num_elements)


def random_bits_triton(seed: Tensor, ids: Tensor, num_words: int, stream: int) -> Tensor:
    """``random_bits`` by the kernel."""
    return _launch(_random_bits_kernel, torch.int64, seed, ids, num_words, stream)


def normal_triton(seed: Tensor, ids: Tensor, num_elements: int, stream: int) -> Tensor:
    """``normal`` by the kernel."""
    return _launch(_normal_kernel, torch.float32, seed, ids, num_elements, stream)


def _launch(kernel, dtype: torch.dtype, seed: Tensor, ids: Tensor, size: int, stream: int):
    out = torch.empty((len(ids), size), dtype=dtype, device=ids.device)
    num_chunks = -(-size // BLOCK)
    if out.numel():
        with torch.cuda.device_of(out):  # Triton launches on the current device
            kernel[(len(ids) * num_chunks,)](
                out, seed, ids.contiguous(), size, num_chunks, STREAM=stream, BLOCK=BLOCK
            )
    return out


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


_kernel_wanted = True


def use_kernel(wanted: bool) -> None:
    """Whether draws on CUDA run the kernel from now on, rather than the definition."""
    global _kernel_wanted
    _kernel_wanted = wanted


def _random_bits_cuda(seed: Tensor, ids: Tensor, num_words: int, stream: int) -> Tensor:
    run = random_bits_triton if _kernel_wanted else random_bits_reference
    return run(seed, ids, num_words, stream)


def _normal_cuda(seed: Tensor, ids: Tensor, num_elements: int, stream: int) -> Tensor:
    run = normal_triton if _kernel_wanted else normal_reference
    return run(seed, ids, num_elements, stream)


if HAS_TRITON:
    _random_bits.register_kernel("cuda")(_random_bits_cuda)
    _normal.register_kernel("cuda")(_normal_cuda)
