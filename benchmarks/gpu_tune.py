"""Launch parameters of kernels, tried at the sizes of DiT-XL/2 with 256 images.

Keys are the parameters, joined by commas: of adaLN tokens, stages and elements of a thread; of GELU
rows, rows and columns of a tile, stages and warps; of attention keys and
stages. Values are milliseconds, and whether the result
is that of the parameters in the source.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rows import Rows
from speed_kernels import adaln, attention, gelu
from speed_kernels.heads import split_heads

GPU = torch.device("cuda")
IMAGES, TOKENS, WIDTH, HEADS = 256, 256, 1152, 16
REPEATS = 8
CACHE = 2**27  # bytes that are written before every call, more than an H200 caches
WARPS = 4  # of GELU, Triton's own choice
CLOSE = 2e-3  # relative: another order of sums, rounded to bfloat16

ADALN_FORWARD = (
    (4, 1, 8), (4, 2, 8), (8, 2, 8), (8, 3, 8), (16, 3, 8), (16, 2, 8), (2, 1, 8), (1, 1, 8),
    (1, 1, 16), (1, 1, 4), (8, 1, 8), (8, 3, 16), (16, 4, 8), (4, 3, 8), (4, 1, 16), (8, 1, 16),
    (32, 3, 8),
)  # fmt: skip
ADALN_BACKWARD = (
    (32, 1, 8), (32, 2, 8), (32, 3, 8), (16, 3, 8), (16, 2, 8), (32, 4, 8), (64, 3, 8), (16, 1, 8),
    (32, 3, 16), (32, 2, 16), (32, 2, 4), (32, 3, 4), (64, 2, 8), (8, 2, 8), (16, 3, 16),
    (16, 3, 4), (16, 4, 8), (32, 1, 16), (32, 1, 4), (64, 1, 8),
)  # fmt: skip
GELU_BACKWARD = (
    (128, 4, 512, 1), (128, 4, 512, 3), (128, 4, 512, 2), (64, 4, 512, 3), (128, 8, 256, 3),
    (128, 16, 128, 3), (32, 4, 512, 1), (64, 4, 512, 1), (128, 2, 512, 1), (128, 2, 1024, 1),
    (128, 2, 1024, 3), (128, 8, 256, 1), (128, 4, 256, 2), (128, 4, 256, 4), (256, 4, 512, 3),
)  # fmt: skip
ATTENTION_BACKWARD = ((64, 1), (64, 2), (64, 3), (32, 1), (32, 2), (32, 3))


def measure(rows: Rows) -> None:
    rows.row("forward", 6, adaln_forward)
    rows.row("backward", 6, adaln_backward)
    rows.row("gelu", 6, gelu_backward)
    rows.row("gelu forward", 2, gelu_forward)
    rows.row("attention backward", 12, attention_backward)
    for width in (72, 64):
        name = f"attention, heads of {width}"
        rows.row(name, 5, partial(attention_gradients, HEADS * width))


def adaln_forward() -> dict[str, Any]:
    inputs = [_tokens(), _tokens(), *(_of_images() for _ in range(3)), _random(WIDTH)]

    def call() -> list[Tensor]:
        return list(adaln._gated_residual_adaln(*inputs, 1e-6)[:2])

    names = ("TOKENS_FORWARD", "STAGES_FORWARD", "ELEMENTS_FORWARD")
    return _tried(adaln, names, ADALN_FORWARD, call)


def adaln_backward() -> dict[str, Any]:
    x, branch, dy, dx_out = (_tokens() for _ in range(4))
    gate, shift, scale = (_of_images() for _ in range(3))
    bias = _random(WIDTH)
    _, _, mean, rstd = adaln._gated_residual_adaln(x, branch, gate, shift, scale, bias, 1e-6)

    def call() -> list[Tensor]:
        dx, dbranch, sums = adaln._gated_residual_adaln_backward(
            dy, dx_out, x, branch, gate, scale, mean, rstd, True
        )
        return [dx, dbranch, sums]

    names = ("TOKENS_BACKWARD", "STAGES_BACKWARD", "ELEMENTS_BACKWARD")
    return _tried(adaln, names, ADALN_BACKWARD, call, sums_over=1)


def gelu_backward() -> dict[str, Any]:
    dy, h = (_random(IMAGES * TOKENS, 4 * WIDTH) for _ in range(2))

    def call() -> list[Tensor]:
        return list(gelu._gelu_backward(dy, h))

    names = ("ROWS", "TILE_ROWS", "TILE_COLUMNS", "STAGES")
    return _tried(gelu, names, GELU_BACKWARD, call, sums_over=0, suffix=f",{WARPS}")


def gelu_forward() -> dict[str, Any]:
    """PyTorch's."""
    h = _random(IMAGES * TOKENS, 4 * WIDTH)
    return {"ms": _milliseconds(partial(F.gelu, h, approximate="tanh"))}


def attention_backward() -> dict[str, Any]:
    qkv, bias = _random(IMAGES, TOKENS, 3 * WIDTH), _random(3 * WIDTH)
    dy = _tokens()
    y, log_sum = torch.ops.speed_kernels.attention(qkv, bias, HEADS)

    def call() -> list[Tensor]:
        return list(attention._attention_backward(dy, qkv, y, log_sum))

    names = ("KEYS", "STAGES")
    return _tried(attention, names, ATTENTION_BACKWARD, call, sums_over=0)


def attention_gradients(dim: int) -> dict[str, Any]:
    """From the gradient of attention to that of qkv and its bias, by either way there."""

    def of_pytorch(qkv: Tensor, num_heads: int, bias: Tensor) -> Tensor:
        heads = split_heads(qkv, num_heads, bias)
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    qkv, bias = (_random(*s).requires_grad_() for s in ((IMAGES, TOKENS, 3 * dim), (3 * dim,)))
    dy = _random(IMAGES, TOKENS, dim)
    found: dict[str, Any] = {}
    gradients = []
    for name, operator in (("PyTorch's", of_pytorch), ("ours", attention.attention)):
        y = operator(qkv, HEADS, bias)
        call = partial(torch.autograd.grad, y, (qkv, bias), dy, retain_graph=True)
        gradients.append(call()[0].float())
        found[f"{name}, ms"] = _milliseconds(call)
    apart = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    return found | {"relative difference": float(apart)}


def _tried(
    module: ModuleType,
    names: Sequence[str],
    choices: Sequence[tuple[int, ...]],
    call: Callable[[], list[Tensor]],
    sums_over: int | None = None,
    suffix: str = "",
) -> dict[str, Any]:
    """Of every choice; the last result of a call is partial sums where ``sums_over`` is given."""

    def results() -> list[Tensor]:
        *others, last = call()
        return [*others, last if sums_over is None else last.sum(sums_over)]

    truth = results()
    found: dict[str, Any] = {}
    for choice in choices:
        key = ",".join(map(str, choice)) + suffix
        with patch.dict(vars(module), zip(names, choice, strict=True)):
            try:
                equal = all(map(_close, results(), truth))
                found[key] = [_milliseconds(call), equal]
            except Exception as error:  # too many registers, or too much shared memory
                found[key] = f"{type(error).__name__}: {str(error)[:80]}"
    return found


def _milliseconds(call: Callable[[], object]) -> float:
    """Median of calls that find nothing in the cache."""
    cache = torch.empty(CACHE, dtype=torch.int8, device=GPU)
    times: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(2):
        call()
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        begin.record()
        call()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return round(statistics.median_high(begin.elapsed_time(end) for begin, end in times), 4)


def _close(found: Tensor, wanted: Tensor) -> bool:
    apart = (found.float() - wanted.float()).norm()
    return bool(apart <= CLOSE * wanted.float().norm())


def _tokens() -> Tensor:
    return _random(IMAGES, TOKENS, WIDTH)


def _of_images() -> Tensor:
    return _random(IMAGES, WIDTH)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device=GPU, dtype=torch.bfloat16)
