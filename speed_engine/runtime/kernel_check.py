"""Every kernel once on this device, against its definition in PyTorch, before a run relies on it.

The inputs are tiny and have the dtypes of training: bfloat16 where autocast gives them, float32 for
noise and parameters. The definition runs on the CPU in float32, on the same values; errors are
relative, |kernel - definition| / |definition| over a whole tensor, the largest of all results and
gradients. What draws or adds noise must have the definition's bits.

Letters: B images, C channels, H heads, K width of one, N tokens, D width, S pixels a side.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speed_engine.ops import FAMILIES, Stream
from speed_engine.runtime.checks import UserError

# Largest relative errors that pass: none at all, of arithmetic in float32, and of results rounded
# to bfloat16 on the way (2^-9 each); a kernel that is wrong is wrong by the order of one.
SAME_BITS, FLOAT32, BFLOAT16 = 0.0, 1e-5, 2.0**-6
# Multiples of 16, as in training: the compiler makes other code, with wider accesses, of these.
B, C, H, K, N, S = 3, 16, 4, 16, 16, 16
D = H * K


class Given:
    """Random inputs, the same numbers on every device.

    Args:
        device: where they shall be.
        dtype: of ``values``, which are rounded to bfloat16 whatever it is.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def exact(self, *shape: int) -> Tensor:
        """Standard normals in float32."""
        return torch.randn(*shape, generator=self._generator).to(self.device)

    def values(self, *shape: int) -> Tensor:
        """Standard normals as a network holds them, which want a gradient."""
        rounded = self.exact(*shape).to(torch.bfloat16).to(self.dtype)
        return rounded.requires_grad_()

    def parameters(self, *shape: int) -> Tensor:
        """Standard normals in float32 that want a gradient."""
        return self.exact(*shape).requires_grad_()

    def whole(self, *values: int) -> Tensor:
        """int64 numbers."""
        return torch.tensor(values, device=self.device)

    @property
    def address(self) -> tuple[Tensor, Tensor]:
        """A seed, and ids of B images, some beyond 32 bits."""
        return torch.tensor(-7, device=self.device), self.whole(5, 2**33 + 1, 2**40)


class Case(NamedTuple):
    """An operator of a family on inputs, and the largest relative error that passes.

    ``run`` takes the operator and its inputs and returns every result and gradient.
    """

    family: str
    operator: str
    limit: float
    run: Callable[[Callable[..., Any], Given], Sequence[Tensor]]


class Finding(NamedTuple):
    """What came of a kernel."""

    operator: str
    family: str
    error: float  # largest relative error; nan where it did not run
    problem: str | None  # None if it passed

    @property
    def passed(self) -> bool:
        """Whether a run may rely on it."""
        return self.problem is None


def _with_gradients(results: Tensor | tuple[Tensor, ...], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results, and the gradients of the inputs by a sum that weighs every element otherwise."""
    results = (results,) if isinstance(results, Tensor) else results
    trained = [result for result in results if result.requires_grad]
    weights = [
        torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape).to(y.dtype) for y in trained
    ]
    return [*results, *torch.autograd.grad(trained, list(inputs), weights)]


def _draw(draw: Callable[..., Tensor], given: Given) -> list[Tensor]:
    return [draw(*given.address, 10, int(Stream.FLIP))]


def _clean_images(clean_images: Callable[..., Tensor], given: Given) -> list[Tensor]:
    seed, ids = given.address
    pixels = (given.exact(2, C, S, S) * 60 + 128).clamp(0, 255).to(torch.uint8)
    posterior = given.exact(B, 2 * C, S, S).half()
    return [
        clean_images(pixels, seed, ids, given.whole(1, 0, 1), flip=True),
        clean_images(posterior, seed, ids, posterior=True, scale=0.18, shift=0.1, flip=True),
    ]


def _noised_input(noised_input: Callable[..., Tensor], given: Given) -> list[Tensor]:
    x0, rows = given.exact(B, C, S, S), given.exact(B, 5)
    return [noised_input(x0, rows, *given.address, torch.bfloat16)]


def _noised_input_and_noise(
    noised_input_and_noise: Callable[..., tuple[Tensor, Tensor]], given: Given
) -> Sequence[Tensor]:
    x0, rows = given.exact(B, C, S, S), given.exact(B, 5)
    return noised_input_and_noise(x0, rows, *given.address, torch.bfloat16)


def _weighted_mse(
    weighted_mse: Callable[..., tuple[Tensor, Tensor]], given: Given
) -> Sequence[Tensor]:
    x0, rows, prediction = given.exact(B, C, S, S), given.exact(B, 5), given.values(B, C, S, S)
    return _with_gradients(weighted_mse(prediction, x0, rows, *given.address), [prediction])


def _hybrid_loss(
    hybrid_loss: Callable[..., tuple[Tensor, Tensor]], given: Given
) -> Sequence[Tensor]:
    x0, rows, answer = given.exact(B, C, S, S), given.exact(B, 5), given.values(B, 2 * C, S, S)
    # (log posterior variance, log beta, gap, first, weight). The first image is one of t = 0, with
    # a variance under which no pixel is so unlikely that rounding decides its gradient.
    bound = torch.tensor([[-1, -0.5, 0.1, 1, 0.5], [-3, -2, 0.1, 0, 0.5], [-2, -1, 0.2, 0, 0.5]])
    bound = bound.to(given.device)
    return _with_gradients(hybrid_loss(answer, x0, rows, bound, *given.address), [answer])


def _adaln(adaln: Callable[..., Tensor], given: Given) -> Sequence[Tensor]:
    inputs = given.values(B, N, D), given.values(B, D), given.values(B, D)
    return _with_gradients(adaln(*inputs), inputs)


def _gated_residual_adaln(
    gated_residual_adaln: Callable[..., tuple[Tensor, Tensor]], given: Given
) -> Sequence[Tensor]:
    tokens = given.values(B, N, D), given.values(B, N, D)
    inputs = *tokens, *(given.values(B, D) for _ in range(3)), given.parameters(D)
    return _with_gradients(gated_residual_adaln(*inputs), inputs)


def _gelu(gelu: Callable[..., Tensor], given: Given) -> Sequence[Tensor]:
    inputs = given.values(B, N, D), given.parameters(D)
    return _with_gradients(gelu(*inputs), inputs)


def _split_heads(split_heads: Callable[..., tuple[Tensor, ...]], given: Given) -> Sequence[Tensor]:
    qkv, bias = given.values(B, N, 3 * D), given.parameters(3 * D)
    return _with_gradients(split_heads(qkv, H, bias), [qkv, bias])


def _attention(attention: Callable[..., Tensor], given: Given) -> Sequence[Tensor]:
    # As DiT-XL/2 has them, since the kernel of so wide heads is the one that fills the registers.
    tokens, packed = 256, 3 * 72 * H
    qkv, bias = given.values(B, tokens, packed), given.parameters(packed)
    return _with_gradients(attention(qkv, H, bias), [qkv, bias])


def _qk_norm_rope(
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor]], given: Given
) -> Sequence[Tensor]:
    q, k = given.values(B, H, N, K), given.values(B, H, N, K)
    weights = given.parameters(K), given.parameters(K)
    angles = given.exact(N, K)
    results = qk_norm_rope(q, k, *weights, angles.cos(), angles.sin(), 1e-6)
    return _with_gradients(results, [q, k, *weights])


def _group_norm_silu(group_norm_silu: Callable[..., Tensor], given: Given) -> Sequence[Tensor]:
    x, modulation = given.values(B, C, S, S), [given.values(B, C), given.values(B, C)]
    weights = [given.parameters(C), given.parameters(C)]
    # As on a CPU, and as U-Nets have it on a GPU: either has kernels of its own.
    layouts = x, x.to(memory_format=torch.channels_last)
    results = tuple(group_norm_silu(y, 2, *weights, *modulation, 1e-5) for y in layouts)
    return _with_gradients(results, [x, *weights, *modulation])


def _adamw_ema(adamw_ema: Callable[..., None], given: Given) -> list[Tensor]:
    shapes = ((D, 3), (5,))
    parameters, gradients, first, average = ([given.exact(*s) for s in shapes] for _ in range(4))
    second = [given.exact(*s).square() for s in shapes]
    before = [p.clone() for p in parameters]
    steps, norm = torch.ones(len(shapes), device=given.device), given.exact(1)[0].abs()
    with torch.no_grad():
        adamw_ema(
            parameters, gradients, first, second, [average], steps, norm, learning_rate=0.5,
            beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, max_norm=0.1, decays=[0.9],
        )  # fmt: skip
    moved = [after - start for after, start in zip(parameters, before, strict=True)]
    return [*moved, *first, *second, *average, steps]


CASES = (
    Case("random", "random_bits", SAME_BITS, _draw),
    Case("random", "normal", SAME_BITS, _draw),
    Case("objective", "clean_images", SAME_BITS, _clean_images),
    Case("objective", "noised_input", SAME_BITS, _noised_input),
    Case("objective", "noised_input_and_noise", SAME_BITS, _noised_input_and_noise),
    Case("objective", "weighted_mse", BFLOAT16, _weighted_mse),
    Case("objective", "hybrid_loss", BFLOAT16, _hybrid_loss),
    Case("block", "adaln", BFLOAT16, _adaln),
    Case("block", "gated_residual_adaln", BFLOAT16, _gated_residual_adaln),
    Case("block", "gelu", BFLOAT16, _gelu),
    Case("block", "split_heads", BFLOAT16, _split_heads),
    Case("block", "attention", BFLOAT16, _attention),
    Case("norms", "qk_norm_rope", BFLOAT16, _qk_norm_rope),
    Case("norms", "group_norm_silu", BFLOAT16, _group_norm_silu),
    Case("update", "adamw_ema", FLOAT32, _adamw_ema),
)


def check_kernels(device: torch.device) -> list[Finding]:
    """Run every kernel on the device and compare; compiles those that are not in Triton's cache.

    Args:
        device: a CUDA device; the CPU in Triton's interpreter (TRITON_INTERPRET=1).

    Raises:
        UserError: a kernel left the device unusable.
    """
    with torch.enable_grad():
        return [_finding(case, device) for case in CASES]


def _finding(case: Case, device: torch.device) -> Finding:
    definitions, kernels = FAMILIES[case.family]
    definition, kernel = (getattr(family, case.operator) for family in (definitions, kernels))
    truth = case.run(definition, Given(torch.device("cpu"), torch.float32))
    try:
        found = [y.cpu() for y in case.run(kernel, Given(device, torch.bfloat16))]
    except Exception as failure:  # whatever a compiler or a driver may raise
        _check_alive(case.operator, device, failure)
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        return Finding(case.operator, case.family, float("nan"), f"does not run: {lines[0]}")
    error = max(relative_error(y, true) for y, true in zip(found, truth, strict=True))
    problem = None
    if not error <= case.limit:  # not a number is wrong, too
        problem = f"differs: relative error {error:.3g}, at most {case.limit:.3g} passes"
    return Finding(case.operator, case.family, error, problem)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth| over all elements, 0 for equal ones, infinite where truth is 0."""
    found, truth = found.detach().double(), truth.detach().double()
    return 0.0 if torch.equal(found, truth) else float((found - truth).norm() / truth.norm())


def _check_alive(operator: str, device: torch.device, failure: Exception) -> None:
    """An illegal access ends the whole context, and every call after it fails."""
    if device.type != "cuda":
        return
    try:
        torch.ones(1, device=device).item()
    except Exception:
        raise UserError(
            f"the kernel {operator} left the GPU unusable in its test ({failure}); run again with "
            "--kernels off, and report it."
        ) from failure
