"""What a DiT block, noise and loss may move to and from memory, counted on a GPU's code.

A block's unit is a (B, N, D) tensor in bfloat16; that of noise and loss, bytes per element of x0.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import toolchain
from speed_kernels import adaln, gelu, heads, noising, variational_bound

ROOT = Path(__file__).parents[2]
COUNTED = {toolchain.TORCH_2_11_TRITON_3_6, toolchain.TORCH_2_14_TRITON_3_8}
BUDGETS = {
    "block": 42.0,
    "block, PyTorch's attention": 48.0,
    "block, autocast": 54.0,
    "block, autocast, bfloat16 stream": 44.0,
    "noise and loss": 14.0,
}
# What Inductor makes of the same block: the count means something if it finds these.
KNOWN = {"block, torch.compile": 62.3, "block, torch.compile, autocast": 81.2}


@pytest.fixture(scope="module")
def counted():
    """Cases of ``benchmarks/traffic.py``, which pretends to have a GPU and so runs by itself."""
    paths = [str(ROOT / folder) for folder in (".", "kernels", "benchmarks")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "traffic.py"), "--json"],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {name: figures["traffic"] for name, figures in json.loads(done.stdout).items()}


@pytest.mark.long
def test_what_is_moved_stays_within_its_budget_and_every_kernel_is_needed_for_it(counted):
    without = {name: figure for name, figure in counted.items() if name.startswith("block without")}
    assert len(without) == 3
    off = [
        f"{case}: {counted[case]}, budget {u}" for case, u in BUDGETS.items() if counted[case] > u
    ]
    off += [f"{case}: {u}" for case, u in without.items() if u <= BUDGETS["block"] + 1]
    off += [
        f"{case}: {counted[case]}, known {u}"
        for case, u in KNOWN.items()
        if counted[case] != pytest.approx(u, abs=0.5)
    ]
    toolchain.hold(COUNTED, off)


@pytest.mark.long
def test_the_loss_that_dit_writes_moves_several_times_as_much(counted):
    assert counted["noise and loss, torch.compile"] > 4 * counted["noise and loss"]


# The count charges our kernels each tensor once. So it is:


@pytest.fixture
def accesses(monkeypatch):
    """Addresses that kernels in Triton's interpreter read and wrote, one per element and time."""
    if torch.cuda.is_available():
        pytest.skip("kernels run in the interpreter where there is no GPU")
    from triton.runtime.interpreter import InterpreterBuilder

    log = []

    def spy(name):
        original = getattr(InterpreterBuilder, name)

        def record(self, pointers, *rest):
            mask = rest[0] if name == "create_masked_load" else rest[1]
            log.extend(pointers.data[mask.data.astype(bool)].flat)
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, record)

    spy("create_masked_load")
    spy("create_masked_store")
    return log


B, N, D = 2, 5, 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_move_every_large_tensor_once(dtype, accesses):
    tokens = lambda: torch.randn(B, N, D).to(dtype)
    row, statistics = torch.randn(B, D).to(dtype), torch.rand(B, N)
    calls = [
        (adaln._adaln, (tokens(), row, row, 1e-6)),
        (adaln._gated_residual_adaln, (tokens(), tokens(), row, row, row, None, 1e-6)),
        (adaln._adaln_backward, (tokens(), tokens(), row, statistics, statistics)),
        (
            adaln._gated_residual_adaln_backward,
            (tokens(), tokens(), tokens(), tokens(), row, row, statistics, statistics, True),
        ),
        (gelu._gelu_backward, (tokens(), tokens())),
        (heads._pack_heads, (tokens(), tokens(), tokens())),
    ]
    for operator, arguments in calls:
        accesses.clear()
        results = operator(*arguments)
        given = [x for x in arguments if isinstance(x, torch.Tensor) and x.numel() == B * N * D]
        assert given and results
        for x in (*given, *results):
            assert_moved_once(x, accesses)


def assert_moved_once(tensor, accesses):
    addresses = addresses_of(tensor)
    ours = set(addresses)
    assert sorted(address for address in accesses if address in ours) == addresses


def addresses_of(tensor) -> list[int]:
    return [tensor.data_ptr() + i * tensor.element_size() for i in range(tensor.numel())]


def test_the_loss_reads_clean_data_at_the_first_step_only(accesses):
    x0, answer = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8).bfloat16()
    rows = torch.tensor([[-2.0, -1.0, 0.1, 0.0, 1.0], [-2.0, -1.0, 0.1, 1.0, 1.0]])
    address = torch.tensor(0), torch.arange(2)
    *_, slopes = variational_bound._hybrid_sums(answer, x0, rows, *address, None)
    for tensor in (answer, slopes, x0[1]):
        assert_moved_once(tensor, accesses)
    assert not set(addresses_of(x0[0])) & set(accesses)


def test_the_noised_input_moves_clean_data_and_itself_once(accesses):
    x0, rows = torch.randn(2, 3, 8, 8), torch.rand(2, 5)
    arguments = x0, rows, torch.tensor(0), torch.arange(2), torch.bfloat16
    for tensor in (x0, noising._noised_input(*arguments)):
        assert_moved_once(tensor, accesses)
