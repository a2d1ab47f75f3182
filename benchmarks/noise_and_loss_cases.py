"""Cases around the model: clean images, noised input, the losses, and noise stored or drawn again.

Baselines are the formulas as facebookresearch/DiT computes them (gaussian_diffusion.py), in eager
mode with its tables on the host, and in torch.compile with tables on the device.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from kernel_case import DEVICE, DRY, Case, compiled, require, sets_for
from speed_kernels.clean_images import clean_images, clean_images_reference
from speed_kernels.noising import noised_input, noised_input_and_noise, noised_input_reference
from speed_kernels.variational_bound import hybrid_loss, hybrid_loss_reference
from speed_kernels.weighted_mse import weighted_mse, weighted_mse_reference

TIMESTEPS = 1000
IMAGES = {  # (B, C, H, W) of one training step
    "DiT-S to XL, latents 32 x 32 x 4": (256, 4, 32, 32),
    "DiT-S to XL, latents 64 x 64 x 4": (256, 4, 64, 64),
    "pixels 64 x 64 x 3": (256, 3, 64, 64),
    "pixels 256 x 256 x 3": (256, 3, 256, 256),
}
if DRY:
    IMAGES = {"tiny": (2, 4, 8, 8)}


# Noised input.

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, TIMESTEPS))
ROOTS = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR)  # float64 on the host, as DiT keeps them


def extract(table: np.ndarray, t: Tensor) -> Tensor:
    """DiT's lookup: the table travels to the device in every step."""
    return torch.from_numpy(table).to(t.device)[t].float()[:, None, None, None]


def noise_eager(x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x0)
    return (extract(ROOTS[0], t) * x0 + extract(ROOTS[1], t) * noise).bfloat16(), noise


def noise_on_device(x0: Tensor, t: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x0)
    return (a[t][:, None, None, None] * x0 + s[t][:, None, None, None] * noise).bfloat16(), noise


def draw_batch(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """x0, timesteps, the first being 0, epsilon-prediction coefficients, seed and ids."""
    t = torch.randint(0, TIMESTEPS, shape[:1], device=DEVICE)
    t[0] = 0
    a, s = (torch.from_numpy(root).float().to(DEVICE)[t] for root in ROOTS)
    rows = torch.stack([a, s, torch.zeros_like(a), torch.ones_like(a), torch.ones_like(a)], dim=1)
    return {
        "x0": torch.randn(shape, device=DEVICE).clamp(-1, 1),
        "t": t,
        "coefficients": rows.contiguous(),
        "seed": torch.tensor(-1, device=DEVICE),
        "ids": torch.arange(shape[0], device=DEVICE) + 2**33,
    }


def noise_cases() -> Iterator[Case]:
    for label, shape in IMAGES.items():
        num_bytes = 6 * int(np.prod(shape))  # x0 in float32, x_in in bfloat16
        batches = [draw_batch(shape) for _ in range(sets_for(num_bytes))]
        tables = [torch.from_numpy(root).float().to(DEVICE) for root in ROOTS]
        fused = [(b["x0"], b["coefficients"], b["seed"], b["ids"], torch.bfloat16) for b in batches]
        by_compiler = compiled(noise_on_device)

        def check(arguments=fused[0]):
            x0, rows, seed, ids, dtype = arguments
            few = x0[:2].cpu(), rows[:2].cpu(), seed.cpu(), ids[:2].cpu()
            expected = noised_input_reference(*few, dtype)
            same = torch.equal(noised_input(*arguments)[:2].cpu(), expected)
            assert same, "noised input: not the CPU's bits"

        yield Case(
            f"noised input, {label}",
            num_bytes,
            {
                "eager as in DiT": lambda i, b=batches: noise_eager(b[i]["x0"], b[i]["t"]),
                "torch.compile": lambda i, b=batches, f=by_compiler, tables=tables: f(
                    b[i]["x0"], b[i]["t"], *tables
                ),
                "fused": lambda i, f=fused: noised_input(*f[i]),
            },
            len(batches),
            check,
        )


# Loss and its gradient.


def loss_eager(prediction: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    return (weight * ((prediction.float() - noise) ** 2).flatten(1).mean(dim=1)).mean()


def loss_cases() -> Iterator[Case]:
    for label, shape in IMAGES.items():
        num_bytes = 8 * int(np.prod(shape))  # bfloat16: read, write and read of difference, write
        batches, noises, predictions = [], [], []
        for _ in range(sets_for(num_bytes)):
            batches.append(draw_batch(shape))
            noises.append(torch.randn(shape, device=DEVICE))
            predictions.append(torch.randn(shape, device=DEVICE).bfloat16().requires_grad_())
        by_compiler = compiled(loss_eager)

        def stored(i, loss, p=predictions, n=noises, b=batches):
            return torch.autograd.grad(loss(p[i], n[i], b[i]["coefficients"][:, 4]), p[i])

        def regenerated(i, loss=weighted_mse, p=predictions, b=batches):
            batch = [b[i][key] for key in ("x0", "coefficients", "seed", "ids")]
            return torch.autograd.grad(loss(p[i], *batch)[0].mean(), p[i])

        def check(run=regenerated, p=predictions, b=batches):
            small = [[tensor.detach()[:2] for tensor in p[:1]]]
            small.append([{k: v[:2] if v.dim() else v for k, v in b[0].items()}])
            small[0] = [tensor.requires_grad_() for tensor in small[0]]
            exact = [tensor.detach().double().requires_grad_() for tensor in small[0]]
            require(
                "loss gradient",
                run(0, p=small[0], b=small[1])[0],
                run(0, loss=weighted_mse_reference, p=exact, b=small[1])[0],
                5e-3,
            )

        yield Case(
            f"loss and gradient, {label}",
            num_bytes,
            {
                "eager as in DiT": lambda i, f=stored: f(i, loss_eager),
                "torch.compile": lambda i, f=stored, g=by_compiler: f(i, g),
                "fused": lambda i, f=regenerated: f(i),
            },
            len(batches),
            check,
        )


# Loss with a learned variance and its gradient.

BETA = np.linspace(1e-4, 0.02, TIMESTEPS)
BEFORE = np.append(1.0, ALPHA_BAR[:-1])
POSTERIOR = np.append((v := BETA * (1 - BEFORE) / (1 - ALPHA_BAR))[1], v[1:])
TABLES = {  # by timestep, as DiT names them
    "log_beta": np.log(BETA),
    "log_posterior": np.log(POSTERIOR),
    "recip": np.sqrt(1 / ALPHA_BAR),
    "recipm1": np.sqrt(1 / ALPHA_BAR - 1),
    "coef1": BETA * np.sqrt(BEFORE) / (1 - ALPHA_BAR),
    "coef2": (1 - BEFORE) * np.sqrt(1 - BETA) / (1 - ALPHA_BAR),
}
Lookup = Callable[[str, Tensor], Tensor]


def from_host(name: str, t: Tensor) -> Tensor:
    return extract(TABLES[name], t)


def from_device(tables: dict[str, Tensor]) -> Lookup:
    return lambda name, t: tables[name][t][:, None, None, None]


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    centered, inverse = x - means, torch.exp(-log_scales)
    above = normal_cdf(inverse * (centered + 1 / 255))
    below = normal_cdf(inverse * (centered - 1 / 255))
    middle = (above - below).clamp(min=1e-12).log()
    darkest, brightest = above.clamp(min=1e-12).log(), (1 - below).clamp(min=1e-12).log()
    return torch.where(x < -0.999, darkest, torch.where(x > 0.999, brightest, middle))


def hybrid_eager(
    answer: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, lookup: Lookup
) -> Tensor:
    epsilon, v = answer.float().chunk(2, dim=1)
    share = (v + 1) / 2
    log_posterior = lookup("log_posterior", t)
    log_variance = share * lookup("log_beta", t) + (1 - share) * log_posterior
    x0_hat = lookup("recip", t) * x_t - lookup("recipm1", t) * epsilon.detach()
    mean = lookup("coef1", t) * x0_hat + lookup("coef2", t) * x_t
    true_mean = lookup("coef1", t) * x0 + lookup("coef2", t) * x_t
    divergence = 0.5 * (
        -1 + log_variance - log_posterior + torch.exp(log_posterior - log_variance)
        + (true_mean - mean) ** 2 * torch.exp(-log_variance)
    )  # fmt: skip
    likelihood = -log_likelihood(x0, mean, 0.5 * log_variance)
    bound = torch.where(t == 0, likelihood.flatten(1).mean(1), divergence.flatten(1).mean(1))
    return (((noise - epsilon) ** 2).flatten(1).mean(1) + bound / math.log(2)).mean()


def bound_rows(t: Tensor) -> Tensor:
    """(B, 5) rows (log posterior variance, log beta, gap, first, weight 1)."""
    gap = TABLES["coef1"] * TABLES["recipm1"]
    columns = [TABLES["log_posterior"], TABLES["log_beta"], gap]
    rows = torch.from_numpy(np.stack(columns, axis=1)).float().to(t.device)[t]
    return torch.cat([rows, (t == 0).float()[:, None], torch.ones_like(rows[:, :1])], dim=1)


def hybrid_cases() -> Iterator[Case]:
    for label, shape in IMAGES.items():
        num_bytes = 16 * int(np.prod(shape))  # bfloat16, two halves; as for the loss
        batches, answers, inputs = [], [], []
        for _ in range(sets_for(num_bytes)):
            batch = draw_batch(shape)
            batch["rows"] = bound_rows(batch["t"])
            arguments = [batch[key] for key in ("x0", "coefficients", "seed", "ids")]
            inputs.append(noised_input_and_noise(*arguments, dtype=torch.float32))
            doubled = (shape[0], 2 * shape[1], *shape[2:])
            answers.append(torch.randn(doubled, device=DEVICE).bfloat16().requires_grad_())
            batches.append(batch)
        tables = {k: torch.from_numpy(v).float().to(DEVICE) for k, v in TABLES.items()}
        by_compiler, there = compiled(hybrid_eager), from_device(tables)

        def baseline(i, loss, lookup, a=answers, b=batches, x=inputs):
            return torch.autograd.grad(loss(a[i], b[i]["x0"], *x[i], b[i]["t"], lookup), a[i])

        def fused(i, loss=hybrid_loss, a=answers, b=batches):
            batch = [b[i][key] for key in ("x0", "coefficients", "rows", "seed", "ids")]
            return torch.autograd.grad(loss(a[i], *batch)[0].mean(), a[i])

        def check(run=fused, plain=baseline, a=answers, b=batches):
            require("DiT's", plain(0, hybrid_eager, from_host)[0], run(0)[0], 5e-3)
            few = {key: value[:2] if value.dim() else value for key, value in b[0].items()}
            half = [a[0].detach()[:2].requires_grad_()]
            exact = [half[0].detach().double().requires_grad_()]
            truth = run(0, hybrid_loss_reference, exact, [few])[0]
            require("hybrid gradient", run(0, a=half, b=[few])[0], truth, 5e-3)

        yield Case(
            f"loss with learned variance and gradient, {label}",
            num_bytes,
            {
                "eager as in DiT": lambda i, f=baseline: f(i, hybrid_eager, from_host),
                "torch.compile": lambda i, f=baseline, g=by_compiler, h=there: f(i, g, h),
                "fused": lambda i, f=fused: f(i),
            },
            len(batches),
            check,
        )


# Noise stored from input to loss, or drawn again: training follows what is faster here.


def stored_noise_cases() -> Iterator[Case]:
    for label, shape in IMAGES.items():
        num_bytes = 14 * int(np.prod(shape))  # of noised input and loss; storing costs 8 more
        batches, predictions = [], []
        for _ in range(sets_for(num_bytes)):
            batch = draw_batch(shape)
            batches.append([batch[key] for key in ("x0", "coefficients", "seed", "ids")])
            predictions.append(torch.randn(shape, device=DEVICE).bfloat16().requires_grad_())

        def stored(i, b=batches, p=predictions):
            x_in, noise = noised_input_and_noise(*b[i], dtype=torch.bfloat16)
            loss, _ = weighted_mse(p[i], *b[i], noise=noise)
            return x_in, loss, *torch.autograd.grad(loss.mean(), p[i])

        def drawn_again(i, b=batches, p=predictions):
            x_in = noised_input(*b[i], dtype=torch.bfloat16)
            loss, _ = weighted_mse(p[i], *b[i])
            return x_in, loss, *torch.autograd.grad(loss.mean(), p[i])

        def check(one=stored, other=drawn_again):
            pairs = zip(one(0), other(0), strict=True)
            assert all(torch.equal(*pair) for pair in pairs), "stored noise changes the bits"

        yield Case(
            f"noised input and loss, {label}",
            num_bytes,
            {"stored": stored, "drawn again": drawn_again},
            len(batches),
            check,
            {"elements_per_image": math.prod(shape[1:])},
        )


# Clean images from a resident data set.


def clean_cases() -> Iterator[Case]:
    stored_images = 8 if DRY else 2**15
    for label, shape in IMAGES.items():
        batch, channels, *size = shape
        pixels = label.startswith("pixels")
        held = min(stored_images, 2**31 // math.prod(shape[1:]))
        if pixels:
            stored = torch.randint(256, (held, channels, *size), device=DEVICE, dtype=torch.uint8)
        else:
            stored = torch.rand((held, 2 * channels, *size), device=DEVICE).half()
        options = dict(posterior=not pixels, flip=True)
        seed = torch.tensor(-1, device=DEVICE)
        ids = torch.arange(batch, device=DEVICE)
        rows = [torch.randint(held, (batch,), device=DEVICE) for _ in range(sets_for(8 * batch))]

        def run(i, f, stored=stored, seed=seed, ids=ids, rows=rows, options=options):
            return f(stored, seed, ids, rows[i], **options)

        def check(run=run, stored=stored, seed=seed, ids=ids, rows=rows, options=options):
            few = stored[rows[0][:2]].cpu(), seed.cpu(), ids[:2].cpu()
            same = torch.equal(
                run(0, clean_images)[:2].cpu(), clean_images_reference(*few, **options)
            )
            assert same, "clean images: not the CPU's bits"

        yield Case(
            f"clean images, mirrored, {label}",
            (5 if pixels else 8) * math.prod(shape),  # stored bytes and float32
            {
                "PyTorch": lambda i, run=run: run(i, clean_images_reference),
                "fused": lambda i, run=run: run(i, clean_images),
            },
            len(rows),
            check,
        )
