"""What every kernel may cost, read from its machine code: no GPU is needed to compile for one.

No toolchain may spill registers, use the stack, or fuse a multiply and an add where noise is drawn,
which would change its bits. How many registers and accesses there are is the toolchain's, so that
the limits hold for those that they were counted with.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import toolchain

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90, 100)
LIMITS = {  # registers per thread; global accesses of 16 bytes; narrower ones, for scalars
    "random_bits": (32, 4, 2),
    "normal": (40, 2, 2),
    "noised_input": (40, 3, 4),
    "noised_input bf16": (40, 2, 4),
    "noised_input and noise": (40, 5, 4),
    "squared_error": (48, 4, 5),
    "squared_error fp32": (48, 6, 5),
    "squared_error stored noise": (40, 6, 3),
    "hybrid": (72, 6, 8),
    "hybrid fp32": (72, 10, 8),
    "hybrid stored noise": (72, 8, 6),
    "clean_images pixels": (32, 2, 2),
    "clean_images posterior": (48, 4, 3),
    # Mirrored elements are loaded one by one.
    "clean_images flipped posterior": (48, 2, 20),
    # What is read ahead has a prologue of its own, hence more accesses.
    "adaln": (80, 12, 2),
    "gated_residual_adaln": (120, 22, 2),
    "gated_residual_adaln widest": (128, 22, 2),
    "adaln_backward": (80, 14, 8),
    "gated_residual_adaln_backward": (128, 28, 8),
    "gated_residual_adaln_backward widest": (128, 24, 8),
    "gelu_backward": (96, 14, 1),
    # The narrow ones are sums, L, and of a width of 72 the last 8 columns of the second tile.
    "attention_backward": (248, 48, 4),
    "attention_backward 72": (255, 56, 15),
    "pack_heads": (64, 6, 3),
    "qk_norm_rope": (80, 32, 0),
    "qk_norm_rope 72": (64, 12, 8),  # half a head is 4.5 times 16 bytes: 8 bytes at a time
    "qk_norm_rope of each image": (80, 32, 0),
    "qk_norm_rope_backward": (104, 36, 2),
    "qk_norm_rope_backward of each image": (104, 36, 2),
    "qk_norm_rope_backward 72": (64, 12, 14),
    "qk_norm_rope_backward widest": (128, 24, 14),
    # The narrow ones are statistics of each channel's group, and sums, which are few.
    "group_norm_silu moments": (48, 2, 2),
    "group_norm_silu statistics": (24, 0, 4),
    "group_norm_silu forward": (64, 8, 16),
    "group_norm_silu backward_sums": (96, 8, 18),
    "group_norm_silu backward_statistics": (32, 0, 13),
    "group_norm_silu backward": (80, 9, 32),
    "group_norm_silu backward_sums NCHW": (64, 2, 8),
    "group_norm_silu backward NCHW": (48, 3, 8),
    # The narrow ones are the last, partial tile of a tensor and the table of addresses.
    "adamw_ema 1 horizon": (64, 18, 30),
    "adamw_ema 2 horizons": (64, 22, 36),
}
MOVED = {  # limits that a toolchain has for itself
    toolchain.TORCH_2_11_TRITON_3_6: {},
    toolchain.TORCH_2_14_TRITON_3_8: {"group_norm_silu moments": (56, 2, 2)},
}
BUDGETS = LIMITS | MOVED[toolchain.nearest(MOVED)]
# Bytes of stack, and accesses to it, of the one kernel that was faster with them than any without
# was on an H200: benchmarks/results/nvidia-h200/gpu_attention.json.
SPILLED = {"attention_backward 72": (96, 46)}
HOPPERS = {"attention_backward", "attention_backward 72"}  # launched on sm_90 only
EXACT = ("random_bits", "normal", "noised_input", "squared_error", "clean_images")

# Cases that must break a budget, and whether the noise kernel depends on contraction.
FAULTS = """
import json
from cubins import CASES, compile_case, machine_code, report

normal, error, rope = CASES["normal"], CASES["squared_error"], CASES["qk_norm_rope"]
out, seed, ids, _, *rest = normal.arguments
norm = CASES["group_norm_silu moments"]
x, partial, _, *others = norm.arguments
*sizes, unit, dim, heads, tokens, block, per_image = rope.arguments
print(json.dumps({
    "unaligned rows": report(compile_case(normal._replace(
        arguments=(out, seed, ids, "i32", *rest)), 90))._asdict(),
    "channels of any number": report(compile_case(norm._replace(
        arguments=(x, partial, "i32", *others)), 90))._asdict(),
    "strides of no known unit": report(compile_case(rope._replace(
        arguments=(*sizes, 1, dim, heads, tokens, block, per_image)), 90))._asdict(),
    "few registers": report(compile_case(error, 90, maxnreg=24))._asdict(),
    "same code without fusion": machine_code(compile_case(error, 90))
        == machine_code(compile_case(error, 90, enable_fp_fusion=False)),
}))
"""


def run(*command: str):
    """Output of a Python process that compiles: this one may have Triton's interpreter on."""
    paths = [str(ROOT / folder) for folder in (".", "kernels", "benchmarks")]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reports(request):
    """By kernel, for one architecture."""
    architecture = str(request.param)
    script = str(ROOT / "benchmarks" / "cubins.py")
    reports = run(script, "--json", "--architectures", architecture)
    kernels = {name.removesuffix(f", sm_{architecture}"): each for name, each in reports.items()}
    assert kernels.keys() == BUDGETS.keys() - (HOPPERS if architecture != "90" else set())
    return kernels


@pytest.mark.long
def test_no_kernel_spills_or_contracts_the_noise_and_each_stays_within_its_budget(reports):
    over = []
    for name, report in reports.items():
        stack, spills = SPILLED.get(name, (0, 0))
        assert report["spills"] <= spills and report["stack"] <= stack, (name, report)
        assert report["fma"] == 0 or not name.startswith(EXACT), (name, report)
        registers, wide, narrow = BUDGETS[name]
        within = report["registers"] <= registers
        if not (within and report["wide"] >= wide and report["narrow"] <= narrow):
            over.append(f"{name}: {report}, budget {BUDGETS[name]}")
    # The bound's own arithmetic may be contracted; drawing the noise, not reading it, adds none.
    assert reports["hybrid"]["fma"] == reports["hybrid stored noise"]["fma"] > 0
    toolchain.hold(MOVED, over)


def test_kernels_that_draw_noise_are_not_contracted_for_one_architecture():
    """The three that everything rests on; the long test has all."""
    kernels = ("normal", "noised_input", "squared_error")
    script = str(ROOT / "benchmarks" / "cubins.py")
    reports = run(script, "--json", "--architectures", "90", "--kernels", *kernels)
    assert len(reports) == 3
    assert all(report["fma"] == report["spills"] == 0 for report in reports.values())


@pytest.mark.long
def test_the_gauges_see_faults():
    figures = run("-c", FAULTS)
    assert figures["unaligned rows"]["narrow"] > BUDGETS["normal"][2]
    assert figures["channels of any number"]["wide"] < BUDGETS["group_norm_silu moments"][1]
    assert figures["strides of no known unit"]["narrow"] > BUDGETS["qk_norm_rope"][2]
    assert figures["few registers"]["spills"] > 0
    assert figures["same code without fusion"]


def test_drift_fails_where_it_was_counted_and_is_told_elsewhere(monkeypatch):
    with pytest.raises(AssertionError, match="52 registers"):
        toolchain.hold({toolchain.HERE}, ["52 registers"])
    monkeypatch.setattr(toolchain, "HERE", toolchain.Toolchain("9.9", "9.9"))
    assert toolchain.nearest(MOVED) == toolchain.TORCH_2_14_TRITON_3_8
    with pytest.warns(UserWarning, match="torch 9.9, triton 9.9 drift .*\n52 registers"):
        toolchain.hold(MOVED, ["52 registers"])


def test_no_two_kernels_have_one_name():
    """By which profiles, and results of benchmarks, tell them apart."""
    names = [
        function.name
        for path in (ROOT / "kernels" / "speed_kernels").glob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        and function.name.endswith("_kernel")
        and any(ast.unparse(by).startswith("triton.jit") for by in function.decorator_list)
    ]
    assert len(names) > 15 and [name for name in names if names.count(name) > 1] == []
