"""Kernels are tried before a run relies on them; one that is wrong or does not run is named."""

import logging
import math

import pytest
import torch

from speed_engine import ops
from speed_engine.config import TrainConfig
from speed_engine.ops import ALL_KERNELS, FAMILIES, NO_KERNELS, kernels_on, use_kernels
from speed_engine.run.starting import machine_choices
from speed_engine.runtime import kernel_check, kernels
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.kernel_check import CASES, Finding, check_kernels, relative_error
from speed_engine.runtime.kernels import choose_kernels, settle_kernels
from speed_engine.runtime.world import World

CUDA = torch.device("cuda")
PASSED = Finding("adaln", "block", 0.001, None)
WRONG = Finding("gelu", "block", 0.5, "differs: relative error 0.5, at most 0.0156 passes")


@pytest.fixture
def gpu(monkeypatch):
    """Kernels that can be tried, and a function that says what comes of it."""
    found: list[Finding] = []
    monkeypatch.setattr(kernels, "kernel_obstacle", lambda device: None)
    monkeypatch.setattr(kernels, "kernel_findings", lambda device: found)
    yield found
    use_kernels(ALL_KERNELS)


@pytest.fixture
def broken(monkeypatch):
    """Replaces a kernel of the family by another function of it."""

    def replace(family: str, operator: str, change) -> None:
        definitions, kernels = FAMILIES[family]
        other = kernels._replace(**{operator: change(getattr(kernels, operator))})
        monkeypatch.setitem(ops.FAMILIES, family, (definitions, other))
        only = tuple(case for case in CASES if case.operator == operator)
        monkeypatch.setattr(kernel_check, "CASES", only)

    return replace


def test_every_kernel_agrees_with_its_definition(device):
    findings = check_kernels(device)
    assert [f for f in findings if not f.passed] == []
    limits = {case.operator: case.limit for case in CASES}
    assert all(f.error <= limits[f.operator] for f in findings)


@torch.no_grad()
def test_kernels_are_tried_backward_wherever_it_is_asked_for(monkeypatch, device):
    monkeypatch.setattr(kernel_check, "CASES", [c for c in CASES if c.operator == "gelu"])
    assert [finding.problem for finding in check_kernels(device)] == [None]


def test_every_operator_with_a_kernel_is_tried():
    tried = {(case.family, case.operator) for case in CASES}
    for family, (definitions, operators) in FAMILIES.items():
        with_kernel = set(operators._fields) - {"linear"}  # a product of PyTorch's either way
        assert {operator for of, operator in tried if of == family} == with_kernel
        assert type(definitions) is type(operators)


def test_a_gradient_that_is_a_little_wrong_is_found(device, broken):
    def louder(adaln):
        def run(x, shift, scale):
            return adaln(x, shift, scale + 0.05 * (scale - scale.detach()))

        return run

    broken("block", "adaln", louder)
    (finding,) = check_kernels(device)
    assert finding.problem is not None and finding.problem.startswith("differs: relative error 0.0")
    assert 0.04 < finding.error < 0.06


def test_a_bit_of_the_noise_that_is_wrong_is_found(device, broken):
    broken("random", "normal", lambda normal: lambda *given: normal(*given) * (1 + 2**-23))
    (finding,) = check_kernels(device)
    assert not finding.passed and 0 < finding.error < 1e-6


def test_a_result_that_is_not_a_number_is_found(device, broken):
    broken("objective", "noised_input", lambda noised: lambda *given: noised(*given) * math.nan)
    (finding,) = check_kernels(device)
    assert not finding.passed


def test_a_kernel_that_is_wrong_for_channels_last_alone_is_found(device, broken):
    def louder(group_norm_silu):
        return lambda x, *rest: group_norm_silu(x, *rest) * (1 if x.is_contiguous() else 1.05)

    broken("norms", "group_norm_silu", louder)
    (finding,) = check_kernels(device)
    assert not finding.passed and 0.04 < finding.error < 0.06


def test_a_kernel_that_does_not_compile_is_named_with_the_first_line_of_why(device, broken):
    def failing(_):
        def run(*_):
            raise RuntimeError("out of resource\nand much more")

        return run

    broken("norms", "group_norm_silu", failing)
    (finding,) = check_kernels(device)
    assert finding.problem == "does not run: out of resource"
    assert math.isnan(finding.error) and finding.family == "norms"


def test_a_kernel_that_ends_the_context_stops_the_run(monkeypatch):
    def dead(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", dead)
    with pytest.raises(UserError, match="adaln left the GPU unusable.*--kernels off"):
        kernel_check._check_alive("adaln", CUDA, RuntimeError("illegal access"))


def test_the_relative_error_is_of_the_whole_tensor():
    truth = torch.tensor([3.0, 4.0])
    assert relative_error(truth.clone(), truth) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_a_family_with_a_wrong_kernel_runs_by_reference_and_the_log_says_so_once(gpu, caplog):
    gpu += [PASSED, WRONG]
    with caplog.at_level(logging.WARNING):
        settle_kernels("auto", "cuda")
    assert kernels_on(CUDA) == ALL_KERNELS._replace(block=False)
    (line,) = caplog.messages
    assert line.startswith("kernel gelu differs: relative error 0.5")
    assert "PyTorch reference runs its family: adaLN, gates, GELU, bias gradients" in line
    choices = choose_kernels("auto", "cuda")
    assert (
        choices["block"].value == "PyTorch reference" and "gelu differs" in choices["block"].reason
    )
    assert choices["norms"].value == "Triton"


def test_kernels_that_pass_run_without_a_word(gpu, caplog):
    gpu.append(PASSED)
    settle_kernels("on", "cuda")
    assert kernels_on(CUDA) == ALL_KERNELS and not caplog.messages


def test_where_kernels_are_demanded_a_wrong_one_is_an_error_that_names_it(gpu):
    gpu += [WRONG, PASSED, WRONG._replace(operator="adaln")]
    text = "kernels=on, but gelu differs.*; adaln differs.*kernels=auto.*kernels=off"
    with pytest.raises(UserError, match=text):
        settle_kernels("on", "cuda")


def test_kernels_demanded_of_a_cpu_are_refused():
    with pytest.raises(UserError, match="kernels=on, but the kernels need CUDA; use kernels=auto"):
        choose_kernels("on", "cpu")


def test_all_processes_follow_the_first_one_s_test_and_it_alone_logs(gpu, caplog):
    class Second(World):
        def from_first(self, compute):
            return [PASSED, WRONG]

    gpu.append(WRONG._replace(family="norms"))  # what this process would find
    settle_kernels("auto", "cuda", Second(rank=1, size=2))
    assert kernels_on(CUDA) == ALL_KERNELS._replace(block=False) and not caplog.messages


def test_a_model_on_the_cpu_changes_nothing_of_those_on_a_gpu():
    for wanted in ("auto", "off"):
        settle_kernels(wanted, "cpu")
        assert kernels_on(CUDA) == ALL_KERNELS


def test_without_kernels_nothing_is_tried(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "kernel_findings", lambda device: pytest.fail("tried"))
    settle_kernels("off", "cuda")
    assert kernels_on(CUDA) == NO_KERNELS
    assert choose_kernels("off", "cuda")["norms"].reason.endswith("asked for")


def test_what_doctor_shows_of_kernels_is_what_the_configuration_asks_for():
    shown = machine_choices(TrainConfig(device="cpu", kernels="off")).shown()
    for name in ("random kernels", "objective kernels", "block kernels", "norm kernels"):
        assert shown[name].value == "PyTorch reference" and "asked for" in shown[name].reason
