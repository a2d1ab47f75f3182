"""Triton as the kernels use it: where it can run, how a grid maps to images, how a value is stored.

Where Triton is not installed (macOS), a stand-in lets the modules import and the references run.

Letters: B images, N elements per image.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None

if TYPE_CHECKING:  # kernels look like Python and are not: nothing in them is checked

    class _Module(type):
        def __getattr__(cls, name: str) -> Any: ...

    class triton(metaclass=_Module):  # noqa: D101
        pass

    class tl(metaclass=_Module):  # noqa: D101
        class constexpr(Any):  # noqa: D106
            def __init__(self, value: object) -> None: ...

elif HAS_TRITON:
    import triton
    import triton.language as tl
else:

    class _Absent:
        """Decorates and annotates as Triton does."""

        def __getattr__(self, name):
            return lambda value=None, *args, **kwargs: value

    triton = tl = _Absent()

INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1
_INTERPRETED = tl.constexpr(INTERPRETED)


def runs_kernels(tensor: Tensor) -> bool:
    """Whether kernels take tensors like this one; if not, the reference does."""
    if tensor.device.type != "cuda" and not (INTERPRETED and tensor.device.type == "cpu"):
        return False
    return HAS_TRITON


@triton.jit
def chunk(program, num_elements, num_chunks, BLOCK: tl.constexpr):
    """Program of a grid of B * num_chunks -> image, its first element here, and that one's offset.

    All int64: B * N can pass 2**31. One grid axis, because the others end at 65535.
    """
    image = (program // num_chunks).to(tl.int64)
    first = (program % num_chunks).to(tl.int64) * BLOCK
    return image, first, image * num_elements + first


@triton.jit
def multiply(a, b):
    """a * b in float32, rounded: no compiler contracts it with an addition into an FMA."""
    if _INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """Float32 values in another dtype, rounded to nearest even.

    The interpreter truncates float32 to bfloat16; there the rounding is done on the bits.
    """
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        bits = tl.where(values == values, bits, 0x7FC0)  # NaN stays NaN
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(DTYPE)


@triton.jit
def store(pointers, values, mask):
    """Store float32 values in the pointers' dtype."""
    tl.store(pointers, rounded(values, pointers.dtype.element_ty), mask=mask)


@triton.jit
def two_sums(a, b):
    """The sums of two vectors, which on a GPU wait for each other once instead of twice."""
    if _INTERPRETED:
        return tl.sum(a, axis=0), tl.sum(b, axis=0)
    else:
        return tl.reduce((a, b), 0, _add_both)


@triton.jit
def _add_both(a, b, more_a, more_b):
    return a + more_a, b + more_b
