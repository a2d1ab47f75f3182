"""What the compiler makes of every kernel, for GPUs that need not be present.

Run: ``python benchmarks/cubins.py [--architectures 80 90 100] [--kernels NAME ...] [--json]``.
Compiles at the shapes of real layers and reads registers, stack, spills and the width of memory
accesses from the machine code. ``tests/speed_kernels/test_budgets.py`` holds the limits.
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from speed_kernels import (
    adaln,
    adamw_ema,
    attention,
    clean_images,
    gelu,
    group_norm_silu,
    heads,
    noising,
    philox,
    qk_norm_rope,
    variational_bound,
    weighted_mse,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
BF16, FP32, INT64, BYTES = "*bf16", "*fp32", "*i64", "*u8"


class Case(NamedTuple):
    """A kernel and the types it is launched with.

    Arguments are the kernel's in order: a type, a compile-time value, or ``(type, 16)`` for an
    integer that is a multiple of 16 at the sizes that matter. Pointers are 16-byte aligned.
    """

    kernel: Any
    arguments: tuple[Any, ...]
    num_warps: int = 4
    architectures: tuple[int, ...] = ARCHITECTURES  # that launch it


MULTIPLE = ("i32", 16)
DRAW = (INT64, INT64)  # seed, ids


def adaln_forward(has_branch: bool, dtype: str = BF16, dim: int = 1152) -> Case:
    """At the width of DiT-XL and in bfloat16, unless said otherwise."""
    block_d = triton.next_power_of_2(dim)
    pointers, strides = (*[dtype] * 7, FP32, FP32), (MULTIPLE,) * 3
    sizes = (MULTIPLE, MULTIPLE, MULTIPLE, "fp32")  # tokens, chunks, dim, eps
    ahead = adaln.stages(adaln.STAGES_FORWARD, *_rows(dtype, 2), block_d=block_d)
    constants = (has_branch, adaln.TOKENS_FORWARD, ahead, block_d)
    num_warps = adaln.num_warps(block_d, adaln.ELEMENTS_FORWARD)
    return Case(adaln._adaln_forward_kernel, (*pointers, *strides, *sizes, *constants), num_warps)


def adaln_backward(num_sums: int, dtype: str = BF16, dim: int = 1152) -> Case:
    """At the width of DiT-XL and in bfloat16, unless said otherwise."""
    block_d, has_branch = triton.next_power_of_2(dim), num_sums > 2
    pointers = (*[dtype] * 6, FP32, FP32, dtype, dtype, FP32)
    sizes = (MULTIPLE, MULTIPLE, MULTIPLE, MULTIPLE, MULTIPLE)  # strides, tokens, chunks, dim
    ahead = adaln.stages(adaln.STAGES_BACKWARD, *_rows(dtype, 4), block_d=block_d)
    constants = (has_branch, has_branch, num_sums, adaln.TOKENS_BACKWARD, ahead, block_d)
    num_warps = adaln.num_warps(block_d, adaln.ELEMENTS_BACKWARD)
    return Case(adaln._adaln_backward_kernel, (*pointers, *sizes, *constants), num_warps)


def _rows(dtype: str, count: int) -> list[torch.Tensor]:
    return [torch.empty(0, dtype=torch.bfloat16 if dtype == BF16 else torch.float32)] * count


def qk_rotation(
    backward: bool, dtype: str, num_heads: int, dim: int, per_image: bool = False
) -> Case:
    """Queries and keys in the packed result of a qkv layer."""
    shape = qk_norm_rope.blocks(num_heads, dim)
    num_warps = shape.pop("num_warps")
    tensors = (dtype,) * (4 if backward else 2)
    outputs = (dtype, dtype, FP32, FP32) if backward else (dtype, dtype)
    sizes = (*["i32"] * 3 * len(tensors), "i32", "i32", "fp32")  # strides, heads, tokens, eps
    unit = math.gcd(8, dim)
    tokens = qk_norm_rope.TOKENS_BACKWARD if backward else qk_norm_rope.TOKENS_FORWARD
    constants = (unit, dim, shape["HEADS"], tokens, shape["BLOCK"], per_image)
    return Case(
        getattr(qk_norm_rope, f"_qk_norm_rope_{'backward' if backward else 'forward'}_kernel"),
        (*tensors, *[FP32] * 4, *outputs, *sizes, *constants),
        num_warps,
    )


def attention_backward(width: int) -> Case:
    """Of 256 tokens in bfloat16."""
    pointers, sizes = (BF16, BF16, BF16, FP32, BF16, FP32), ("i32", "fp32")  # heads, scale
    constants = (*attention.tiles(width).values(), 256, attention.KEYS, attention.STAGES)
    kernel, num_warps = attention._attention_backward_kernel, attention.num_warps(256)
    return Case(kernel, (*pointers, *sizes, *constants), num_warps, architectures=(90,))


def group_norm(kernel: str, channels_last: bool) -> Case:
    """With 256 channels in 32 groups, 64 x 64 positions, scaled and shifted, in bfloat16."""
    tile, _ = group_norm_silu.tiles(256, 4096, channels_last)
    num_warps = 4 if "statistics" in kernel else tile["num_warps"]
    del tile["num_warps"]
    partials = tuple(group_norm_silu.partials(16, 8).values())
    statistics, modulation = (FP32, FP32), (FP32, FP32, BF16, BF16, MULTIPLE, MULTIPLE)
    sizes = (MULTIPLE, MULTIPLE, MULTIPLE)  # channels, groups, positions
    arguments = {
        "moments": (BF16, FP32, MULTIPLE, MULTIPLE, *tile.values()),
        "statistics": (FP32, *statistics, *sizes, MULTIPLE, "fp32", *partials),
        "forward": (BF16, *statistics, *modulation, BF16, *sizes, True, *tile.values()),
        "backward_sums": (BF16, BF16, *statistics, *modulation, FP32, *sizes, True, *tile.values()),
        "backward_statistics": (
            FP32, *modulation, FP32, FP32, *statistics, MULTIPLE, *sizes, True, *partials
        ),
        "backward": (
            BF16, BF16, *statistics, *statistics, *modulation, BF16, *sizes, True, *tile.values()
        ),
    }  # fmt: skip
    return Case(
        getattr(group_norm_silu, f"_group_norm_{kernel}_kernel"), arguments[kernel], num_warps
    )


def adamw(horizons: int) -> Case:
    """As many averages as horizons."""
    tables = (INT64, INT64, "*i32", "*i32", FP32)
    constants = (horizons, 16, adamw_ema.BLOCK)
    arguments = (*tables, "i32", *["fp32"] * 5, *constants)  # i32: number of tensors
    return Case(adamw_ema._adamw_ema_kernel, arguments, num_warps=8)


def noised(x0: str, noise: str | None = None) -> Case:
    """A bfloat16 model input; ``noise`` is its type where it is stored."""
    arguments = (x0, FP32, *DRAW, BF16, noise, MULTIPLE, "i32", philox.BLOCK)
    return Case(noising._noised_input_kernel, arguments)


def squared_error(prediction: str, noise: str | None = None) -> Case:
    """Against a float32 x0."""
    pointers = (prediction, FP32, FP32, *DRAW, noise, prediction, FP32)
    sizes = (MULTIPLE, "i32", philox.BLOCK)
    return Case(weighted_mse._squared_error_kernel, (*pointers, *sizes))


def hybrid(answer: str, noise: str | None = None) -> Case:
    """Against a float32 x0."""
    pointers = (answer, FP32, FP32, *DRAW, noise, answer, FP32)
    sizes = (MULTIPLE, "i32", philox.BLOCK)
    return Case(variational_bound._hybrid_kernel, (*pointers, *sizes))


def cleaned(stored: str, flips: str | None, posterior: bool) -> Case:
    """Rows gathered from a resident data set."""
    pointers = (stored, *DRAW, INT64, flips, FP32)
    sizes = (MULTIPLE, "i32", MULTIPLE, "fp32", "fp32")
    constants = (posterior, stored == BYTES, posterior, philox.BLOCK)
    return Case(clean_images._clean_images_kernel, (*pointers, *sizes, *constants))


CASES = {
    "random_bits": Case(
        philox._random_bits_kernel, (INT64, *DRAW, MULTIPLE, "i32", 0, philox.BLOCK)
    ),
    "normal": Case(philox._normal_kernel, (FP32, *DRAW, MULTIPLE, "i32", 0, philox.BLOCK)),
    "noised_input": noised(FP32),
    "noised_input bf16": noised(BF16),
    "noised_input and noise": noised(FP32, noise=FP32),
    "squared_error": squared_error(BF16),
    "squared_error fp32": squared_error(FP32),
    "squared_error stored noise": squared_error(BF16, noise=FP32),
    "hybrid": hybrid(BF16),
    "hybrid fp32": hybrid(FP32),
    "hybrid stored noise": hybrid(BF16, noise=FP32),
    "clean_images pixels": cleaned(BYTES, None, False),
    "clean_images posterior": cleaned("*fp16", None, True),
    "clean_images flipped posterior": cleaned("*fp16", BYTES, True),
    "adamw_ema 1 horizon": adamw(horizons=1),
    "adamw_ema 2 horizons": adamw(horizons=2),
    "adaln": adaln_forward(has_branch=False),
    "gated_residual_adaln": adaln_forward(has_branch=True),
    "gated_residual_adaln widest": adaln_forward(True, FP32, adaln.MAX_DIM),
    "adaln_backward": adaln_backward(num_sums=2),
    "gated_residual_adaln_backward": adaln_backward(num_sums=4),
    "gated_residual_adaln_backward widest": adaln_backward(4, FP32, adaln.MAX_DIM),
    "gelu_backward": Case(
        gelu._gelu_backward_kernel,
        (
            *(BF16, BF16, BF16, FP32, MULTIPLE, MULTIPLE),
            *(gelu.ROWS, gelu.TILE_ROWS, gelu.TILE_COLUMNS, gelu.STAGES),
        ),
    ),
    "attention_backward": attention_backward(64),
    "attention_backward 72": attention_backward(72),
    "pack_heads": Case(
        heads._pack_kernel,
        (*[BF16] * 4, FP32, MULTIPLE, MULTIPLE, heads.ROWS, heads.TILE_ROWS, heads.TILE_COLUMNS),
    ),
    "qk_norm_rope": qk_rotation(False, BF16, 12, 64),
    "qk_norm_rope 72": qk_rotation(False, BF16, 16, 72),
    "qk_norm_rope of each image": qk_rotation(False, BF16, 12, 64, per_image=True),
    "qk_norm_rope_backward": qk_rotation(True, BF16, 12, 64),
    "qk_norm_rope_backward of each image": qk_rotation(True, BF16, 12, 64, per_image=True),
    "qk_norm_rope_backward 72": qk_rotation(True, BF16, 16, 72),
    "qk_norm_rope_backward widest": qk_rotation(True, FP32, 8, qk_norm_rope.MAX_DIM),
    **{
        f"group_norm_silu {kernel}": group_norm(kernel, channels_last=True)
        for kernel in (
            "moments",
            "statistics",
            "forward",
            "backward_sums",
            "backward_statistics",
            "backward",
        )
    },
    "group_norm_silu backward_sums NCHW": group_norm("backward_sums", channels_last=False),
    "group_norm_silu backward NCHW": group_norm("backward", channels_last=False),
}


class Report(NamedTuple):
    """Resources per thread and instructions of one compiled kernel."""

    registers: int
    stack: int  # bytes
    spills: int  # loads and stores of thread-local memory
    wide: int  # global accesses of at least 16 bytes
    narrow: int  # other global accesses
    instructions: int
    fma: int  # fused multiply-adds that the PTX asks for


def compile_case(case: Case, architecture: int, **options):
    """The case's kernel as Triton compiles it for ``sm_architecture``."""
    signature, values, attributes = {}, {}, {}
    for i, (name, argument) in enumerate(zip(case.kernel.arg_names, case.arguments, strict=True)):
        if isinstance(argument, tuple):
            signature[name], divisor = argument
            attributes[(i,)] = [["tt.divisibility", divisor]]
        elif isinstance(argument, str):
            signature[name] = argument
            if argument.startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name], values[(i,)] = "constexpr", argument
    return triton.compile(
        ASTSource(case.kernel, signature, values, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": case.num_warps, **options},
    )


def machine_code(compiled) -> list[str]:
    """SASS instructions, one per item, without addresses and predicates."""
    text = _run("nvdisasm", "-c", compiled.asm["cubin"])
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", text)


def report(compiled) -> Report:
    """Resources and accesses of a compiled kernel."""
    usage = _run("cuobjdump", "-res-usage", compiled.asm["cubin"])
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = machine_code(compiled)
    accesses = [line for line in code if re.match(r"(LDG|LDGSTS|STG)\b", line)]
    wide = sum(".128" in line or ".256" in line for line in accesses)
    return Report(
        registers=resources["REG"],
        stack=resources["STACK"] + resources["LOCAL"],
        spills=sum(re.match(r"(LDL|STL)\b", line) is not None for line in code),
        wide=wide,
        narrow=len(accesses) - wide,
        instructions=len(code),
        fma=len(re.findall(r"\bfma\.rn", compiled.asm["ptx"])),
    )


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--kernels", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", action="store_true", help="one object, for programs")
    options = parser.parse_args()
    reports = {
        f"{name}, sm_{architecture}": report(compile_case(CASES[name], architecture))
        for architecture in options.architectures
        for name in options.kernels
        if architecture in CASES[name].architectures
    }
    if options.json:
        print(json.dumps({name: figures._asdict() for name, figures in reports.items()}))
        return
    print(f"{'':28}" + "".join(f"{field:>14}" for field in Report._fields))
    for name, figures in reports.items():
        print(f"{name:28}" + "".join(f"{figure:14}" for figure in figures))


if __name__ == "__main__":
    main()
