"""Processes on T timesteps, given by tables: DDPM's schedules and whatever a user or diffusers has.

Letters: T timesteps, N timesteps asked for. t is an int64 index; index 0 is the cleanest.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.runtime.checks import UserError


class DiscreteSchedule(NoiseSchedule):
    """A process given by alpha and sigma at its timesteps.

    Args:
        name: what errors and reports call it.
        alpha: (T,) factor of the clean data.
        sigma: (T,) standard deviation of the noise.
        prediction: the target of the baseline.
        sigma_data: standard deviation of the clean data.
        linear_betas: (beta_1, beta_T) if beta is linear in t, where closed forms exist.
        times: (T,) what the network is given for t; by default the index.

    Raises:
        UserError: fewer than 2 timesteps, or noise that does not grow with t.
    """

    discrete = True

    def __init__(
        self,
        name: str,
        alpha: Tensor,
        sigma: Tensor,
        *,
        prediction: str = "epsilon",
        sigma_data: float = 1.0,
        linear_betas: tuple[float, float] | None = None,
        times: Tensor | None = None,
    ) -> None:
        if alpha.ndim != 1 or len(alpha) < 2 or alpha.shape != sigma.shape:
            raise UserError(
                f"schedule {name!r} has shapes {tuple(alpha.shape)} and {tuple(sigma.shape)}; "
                "two sequences of one length, at least 2 timesteps, are needed."
            )
        self.name, self.num_timesteps = name, len(alpha)
        self.prediction, self.sigma_data, self.linear_betas = prediction, sigma_data, linear_betas
        self._alpha, self._sigma, self._times = alpha.double(), sigma.double(), times
        if not bool(((self._alpha > 0) & (self._sigma > 0)).all()):
            raise UserError(
                f"schedule {name!r}: alpha and sigma must be finite and above 0 at every timestep."
            )
        growth = (self._sigma / self._alpha).diff()
        if not bool((growth > 0).all()):
            where = int((~(growth > 0)).nonzero()[0])
            raise UserError(
                f"schedule {name!r} is not monotone: the signal-to-noise ratio does not fall from "
                f"timestep {where} to {where + 1}; noise must grow with t."
            )

    @property
    def timesteps(self) -> Tensor:
        """(T,) int64, every timestep from clean to noisy."""
        return torch.arange(self.num_timesteps)

    @property
    def edges(self) -> Tensor:
        """(T + 1,) log(sigma / alpha) half-way between timesteps, extrapolated at the ends."""
        log_noise = (self._sigma / self._alpha).log()
        inner = (log_noise[1:] + log_noise[:-1]) / 2
        return torch.cat([2 * log_noise[:1] - inner[:1], inner, 2 * log_noise[-1:] - inner[-1:]])

    @property
    def variance_preserving(self) -> bool:
        """Whether alpha**2 + sigma**2 is 1."""
        return bool((self._alpha.square() + self._sigma.square() - 1).abs().max() < 1e-6)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float64 alpha**2."""
        return self._alpha.square()

    def alpha(self, t: Tensor) -> Tensor:
        """(N,) int64 -> (N,) factor of the clean data."""
        return self._alpha[t]

    def sigma(self, t: Tensor) -> Tensor:
        """(N,) int64 -> (N,) standard deviation of the noise."""
        return self._sigma[t]

    def model_time(self, t: Tensor) -> Tensor:
        """(N,) int64 -> (N,): the index, unless the process came with times of its own."""
        return t if self._times is None else self._times.to(t.device)[t]

    def time_at(self, level: float) -> float:
        """The index whose log(sigma / alpha) is nearest."""
        return int(((self._sigma / self._alpha).log() - math.log(level)).abs().argmin())

    def solver_times(self, num_steps: int) -> list[float]:
        """``num_steps`` indices from T - 1 down to 0, to the letter as IDDPM respaces.

        That is improved-diffusion's ``space_timesteps``, which DiT has, too: a running sum in
        floating point, rounded to even; a single step is asked for index 0.
        """
        if not 1 <= num_steps <= self.num_timesteps:
            raise UserError(f"{num_steps} solver steps: must lie in [1, {self.num_timesteps}].")
        stride = (self.num_timesteps - 1) / (num_steps - 1) if num_steps > 1 else 1
        rising, position = [], 0.0
        for _ in range(num_steps):
            rising.append(round(position))
            position += stride
        return rising[::-1]


def from_alphas_cumprod(
    alphas_cumprod: Tensor,
    name: str = "custom",
    *,
    prediction: str = "epsilon",
    sigma_data: float = 1.0,
    linear_betas: tuple[float, float] | None = None,
) -> DiscreteSchedule:
    """The variance-preserving process with signal power alpha**2 (T,), falling inside (0, 1).

    Raises:
        UserError: a value outside (0, 1), or one that does not fall.
    """
    abar = alphas_cumprod.double()
    if abar.numel() and not bool(((abar > 0) & (abar < 1)).all()):
        raise UserError(
            f"schedule {name!r} has alphas_cumprod in [{float(abar.min()):.3g}, "
            f"{float(abar.max()):.3g}]; they must lie strictly between 0 and 1."
        )
    return DiscreteSchedule(
        name, abar.sqrt(), (1 - abar).sqrt(),
        prediction=prediction, sigma_data=sigma_data, linear_betas=linear_betas,
    )  # fmt: skip


def from_betas(
    betas: Tensor, name: str = "custom", *, linear_betas: tuple[float, float] | None = None
) -> DiscreteSchedule:
    """The process with per-step noise variances ``betas`` (T,), each in (0, 1).

    Raises:
        UserError: a beta lies outside (0, 1).
    """
    betas = betas.double()
    outside = (~((betas > 0) & (betas < 1))).nonzero()
    if len(outside):
        where = int(outside[0])
        raise UserError(
            f"schedule {name!r}: betas[{where}] = {float(betas[where]):.6g}; "
            "every beta must lie strictly between 0 and 1."
        )
    return from_alphas_cumprod(torch.cumprod(1 - betas, dim=0), name, linear_betas=linear_betas)


def from_sigmas(
    sigmas: Tensor,
    name: str = "custom",
    *,
    flow: bool = False,
    sigma_data: float | None = None,
    times: Tensor | None = None,
    prediction: str | None = None,
) -> DiscreteSchedule:
    """The process with noise levels ``sigmas`` (T,), rising or falling; a last zero is dropped.

    Args:
        sigmas: standard deviations of the noise.
        name: what errors and reports call it.
        flow: x_t = (1 - sigma) x0 + sigma noise, trained on its velocity, sigma below or at 1;
            otherwise x_t = x0 + sigma noise, scaled for the model and trained as EDM does.
        sigma_data: standard deviation of the clean data; by default 1 for flows, else 0.5.
        times: (T,) what the network is given for t, in the order of ``sigmas``; by default 1000
            sigma for flows, else 250 log(sigma).
        prediction: the target of the baseline; by default velocity for flows, else F.

    Raises:
        UserError: a sigma is negative or too large, or the order is not monotone.
    """
    sigmas = sigmas.double()
    if times is None:
        times = (1000 * sigmas if flow else 250 * sigmas.log()).float()
    if len(sigmas) > 1 and sigmas[0] > sigmas[-1]:
        sigmas, times = sigmas.flip(0), times.flip(0)
    if len(sigmas) and sigmas[0] == 0:
        sigmas, times = sigmas[1:], times[1:]
    if flow and len(sigmas) and sigmas.max() > 1:
        raise UserError(f"schedule {name!r}: sigma {float(sigmas.max()):.3g} of a flow exceeds 1.")
    sigma_data = sigma_data or (1.0 if flow else 0.5)
    if not flow:
        return _SigmaSpace(
            name, torch.ones_like(sigmas), sigmas, prediction=prediction or "F",
            sigma_data=sigma_data, times=times,
        )  # fmt: skip
    # A flow's last timestep may be pure noise; alpha stays above 0 so that ratios exist.
    alpha = (1 - sigmas).clamp(min=2.0**-24)
    return DiscreteSchedule(
        name, alpha, sigmas, prediction=prediction or "velocity", sigma_data=sigma_data, times=times
    )


class _SigmaSpace(DiscreteSchedule):
    """x_t = x0 + sigma noise; the model sees it at unit variance."""

    def input_scale(self, t: Tensor) -> Tensor:
        return (self.sigma(t).square() + self.sigma_data**2).rsqrt()


def from_diffusers(noise_scheduler: Any) -> DiscreteSchedule:
    """The process of a diffusers scheduler: DDPM, DDIM, EulerDiscrete, FlowMatchEuler, EDMEuler.

    Its timesteps are those that diffusers' training loops pass to ``add_noise``; its baseline's
    target is the scheduler's ``prediction_type``, with the sign and scale that the scheduler gives
    it. Build it before ``set_timesteps`` changes the scheduler. Solvers that draw from flows
    (``use_flow_sigmas``) have a flow's timesteps only after ``set_timesteps(num_train_timesteps)``,
    which their ``add_noise`` needs, too.

    Args:
        noise_scheduler: with ``alphas_cumprod``, or with ``sigmas`` and ``timesteps``.

    Raises:
        UserError: it is no scheduler of these kinds, predicts something else, or holds another
            number of timesteps than it says.

    Examples:
        >>> process = se.from_diffusers(scheduler)
        >>> process.num_timesteps, process.prediction
        (1000, 'epsilon')
    """
    name = type(noise_scheduler).__name__
    config: Any = getattr(noise_scheduler, "config", None)
    if isinstance(noise_scheduler, str):
        raise UserError(
            f"{noise_scheduler!r} is no scheduler; needed is one of diffusers, such as "
            "DDPMScheduler(), or a process: build_schedule of speed_engine.diffusion.processes "
            "makes one of its name."
        )
    if getattr(config, "use_flow_sigmas", False):
        return _in_sigma(_with_all_timesteps(noise_scheduler, config, name), name)
    abar = getattr(noise_scheduler, "alphas_cumprod", None)
    if abar is None:
        return _in_sigma(noise_scheduler, name)
    target = _target(name, config, _VP_TARGETS)
    abar = abar.double().cpu().clone()
    zero_snr = getattr(config, "rescale_betas_zero_snr", False)
    # It ends in pure noise, or where diffusers' solvers bound it, which may be above the last but
    # one.
    if len(abar) > 1 and (abar[-1] <= 0 or (zero_snr and abar[-1] >= abar[-2])):
        abar[-1] = min(2.0**-24, float(abar[-2]) / 2)
    linear = _linear_betas(config, abar)
    return from_alphas_cumprod(abar, name, prediction=target, linear_betas=linear)


def _with_all_timesteps(noise_scheduler: Any, config: Any, name: str) -> Any:
    """A copy of a solver that draws from flows, with the timesteps of training.

    Raises:
        UserError: the solver has none of that number.
    """
    copied = copy.deepcopy(noise_scheduler)
    try:
        copied.set_timesteps(config.num_train_timesteps)
    except Exception as error:  # whatever a scheduler of others does
        raise UserError(
            f"{name}.set_timesteps({config.num_train_timesteps}) failed, so that its timesteps of "
            f"training are not known ({type(error).__name__}: {error}); use from_sigmas."
        ) from error
    return copied


def _in_sigma(noise_scheduler: Any, name: str) -> DiscreteSchedule:
    """The process of a scheduler that is given by its sigmas: a flow, or EDM's."""
    config: Any = getattr(noise_scheduler, "config", None)
    sigmas = getattr(noise_scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) == 0 or config is None:
        raise UserError(f"{name} has neither alphas_cumprod nor sigmas; use from_sigmas.")
    sigmas = sigmas.cpu()
    times = getattr(noise_scheduler, "timesteps", None)
    if times is not None:
        sigmas = sigmas[: len(times)]  # what follows is where the last step ends
    if len(sigmas) - config.num_train_timesteps not in (0, 1):  # EDMEuler holds one more
        raise UserError(
            f"{name} holds {len(sigmas)} sigmas for {config.num_train_timesteps} timesteps; "
            "pass a scheduler on which set_timesteps was not called."
        )
    sigma_data = getattr(config, "sigma_data", None)
    flow = sigma_data is None and bool(sigmas.max() <= 1)
    if not flow and sigma_data is None:
        raise UserError(
            f"{name} has no sigma_data, so that it does not say how its model's answer is scaled; "
            "use from_sigmas."
        )
    if not flow and not hasattr(config, "prediction_type"):
        raise UserError(
            f"{name} has no prediction_type, so that it does not say what its model predicts; "
            "use from_sigmas."
        )
    return from_sigmas(
        sigmas, name, flow=flow, sigma_data=sigma_data,
        times=None if times is None else times.cpu(),
        prediction=_target(name, config, _FLOW_TARGETS if flow else _EDM_TARGETS),
    )  # fmt: skip


def _target(name: str, config: Any, targets: dict[str, str]) -> str:
    """What a scheduler's model predicts, as we call it; the first target is the default.

    Raises:
        UserError: the scheduler has none of these.
    """
    kind = getattr(config, "prediction_type", next(iter(targets)))
    if kind not in targets:
        flow = "; flow_prediction needs use_flow_sigmas=True" if kind == "flow_prediction" else ""
        raise UserError(
            f"{name} has prediction_type {kind!r}; known are {', '.join(targets)}{flow}."
        )
    return targets[kind]


def _linear_betas(config: Any, abar: Tensor) -> tuple[float, float] | None:
    """First and last beta of a scheduler that is linear in beta, where closed forms hold.

    What it says of its betas is compared with its signal power (T,), which other options of some
    schedulers move.
    """
    if getattr(config, "beta_schedule", None) != "linear":
        return None
    first, last = config.beta_start, config.beta_end
    betas = torch.linspace(first, last, len(abar), dtype=torch.float64)
    same = torch.allclose(torch.cumprod(1 - betas, dim=0), abar, rtol=1e-3, atol=0)
    return (first, last) if same else None


# prediction_type of diffusers' schedulers -> key of PREDICTIONS
_VP_TARGETS = {
    "epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "original_sample": "x0",
}  # fmt: skip
_FLOW_TARGETS = {"flow_prediction": "velocity", "epsilon": "epsilon", "sample": "x0"}
_EDM_TARGETS = {"epsilon": "F", "v_prediction": "negative_F"}


def linear(
    num_timesteps: int = 1000, beta_min: float | None = None, beta_max: float | None = None
) -> DiscreteSchedule:
    """Betas linear in t (Ho et al. 2020).

    Args:
        num_timesteps: T; more than 20 with the default betas.
        beta_min: of the first timestep; by default 1e-4 for T = 1000 and in inverse proportion to
            T otherwise, so that every T ends at the same noise (Nichol and Dhariwal 2021).
        beta_max: of the last timestep; by default 0.02, likewise.
    """
    first = 1e-4 * _finer(num_timesteps) if beta_min is None else beta_min
    last = 0.02 * _finer(num_timesteps) if beta_max is None else beta_max
    betas = torch.linspace(first, last, num_timesteps, dtype=torch.float64)
    return from_betas(betas, "linear", linear_betas=(first, last))


def quadratic(num_timesteps: int = 1000) -> DiscreteSchedule:
    """Square roots of beta linear in t (DDPM's "quad"), from 1e-4 to 0.02 for T = 1000."""
    return from_betas(_squared_line(num_timesteps, 1e-4, 0.02), "quadratic")


def scaled_linear(num_timesteps: int = 1000) -> DiscreteSchedule:
    """The same with the betas of Stable Diffusion (Rombach et al. 2022)."""
    return from_betas(_squared_line(num_timesteps, 0.00085, 0.012), "scaled_linear")


def cosine(num_timesteps: int = 1000) -> DiscreteSchedule:
    """alpha**2 falls as a squared cosine, betas at most 0.999 (Nichol and Dhariwal 2021)."""
    edges = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    power = ((edges + 0.008) / 1.008 * math.pi / 2).cos().square()
    return from_betas((1 - power[1:] / power[:-1]).clamp(max=0.999), "cosine")


def _squared_line(num_timesteps: int, first: float, last: float) -> Tensor:
    """(T,) betas between those of 1000 timesteps, made as much larger as T is smaller."""
    roots = torch.linspace(first**0.5, last**0.5, num_timesteps, dtype=torch.float64)
    return roots.square() * _finer(num_timesteps)


def _finer(num_timesteps: int) -> float:
    """How many of 1000 timesteps one of T stands for."""
    return 1000 / num_timesteps
