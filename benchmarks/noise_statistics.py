"""Are the normals of ``philox.py`` normal and independent? Over 10^8 draws, in about a minute.

Run: ``python benchmarks/noise_statistics.py [--draws N]``. Draws on the GPU if there is one. Every
figure is a standard score or a p-value; the run fails if one of them is beyond what chance gives.
"""

import argparse
import math

import numpy as np
import torch
from scipy import special, stats

from harness import write_result
from speed_kernels.philox import Stream, normal, random_bits

IMAGES, ELEMENTS = 1024, 4096  # of one batch: 32 x 32 x 4 latents
BINS = 1024  # of the histogram, equally likely
LARGEST_SCORE, SMALLEST_P = 5.0, 1e-5
WITHIN_AN_IMAGE, ACROSS_IMAGES = (1, 2, 3, 4, 5, 1024), (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=10**8)
    batches = -(-parser.parse_args().draws // (IMAGES * ELEMENTS))
    sums: dict[str, float] = {}
    histogram, p_values, draws, largest = np.zeros(BINS), [], 0, 0.0
    for index in range(batches):
        seed, ids = place(index)
        noise = normal(seed, ids, ELEMENTS).cpu().numpy().astype(np.float64)
        draws, largest = draws + noise.size, max(largest, float(np.abs(noise).max()))
        ranks = special.ndtr(noise.ravel())
        histogram += np.bincount((ranks * BINS).astype(int).clip(0, BINS - 1), minlength=BINS)
        p_values.append(stats.kstest(ranks[:: len(ranks) // 100_000], "uniform").pvalue)
        other = normal(seed, ids, ELEMENTS, Stream.GENERATION).cpu().numpy().astype(np.float64)
        for name, (values, variance) in scores(noise, other).items():
            sums[name] = sums.get(name, 0.0) + values.sum() / math.sqrt(values.size * variance)
    standard_scores = {name: round(total / math.sqrt(batches), 3) for name, total in sums.items()}
    tests = {
        "chi-square of the histogram": stats.chisquare(histogram).pvalue,
        "KS of the batches' KS p-values": stats.kstest(p_values, "uniform").pvalue,
        "chi-square of single bits": bits_p_value(),
    }
    path = write_result(
        "noise_statistics",
        {
            "draws": draws,
            "seeds": batches,
            "largest_magnitude": largest,
            "standard_scores": standard_scores,
            "p_values": {name: round(float(p), 5) for name, p in tests.items()},
        },
    )
    for name, figure in {**standard_scores, **tests}.items():
        print(f"{name:36} {figure:8.4f}")
    print(f"{draws:,} draws from {batches} seeds, largest {largest:.3f}; {path}")
    assert max(map(abs, standard_scores.values())) < LARGEST_SCORE
    assert min(tests.values()) > SMALLEST_P


def place(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A seed and the counters of a batch: small and huge ones, all around the int64 range."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = (-1) ** index * index * 0x123456789ABCDEF
    first = (0, 2**31 - IMAGES // 2, 2**32 - IMAGES // 2, 2**40, -IMAGES // 2)[index % 5]
    counters = torch.arange(first, first + IMAGES, device=device)
    return torch.tensor((seed + 2**63) % 2**64 - 2**63, device=device), counters


def scores(noise: np.ndarray, other: np.ndarray) -> dict[str, tuple[np.ndarray, float]]:
    """Values of expectation 0 under independent normals, and the variance of one."""
    square = noise**2
    values = {
        "mean": (noise, 1.0),
        "variance": (square - 1, 2.0),
        "skewness": (noise * (square - 3), 6.0),
        "kurtosis": (square**2 - 6 * square + 3, 24.0),
        "between streams": (noise * other, 1.0),
    }
    for lag in WITHIN_AN_IMAGE:
        values[f"elements, lag {lag}"] = (noise[:, lag:] * noise[:, :-lag], 1.0)
        values[f"elements squared, lag {lag}"] = ((square[:, lag:] - 1) * (square[:, :-lag] - 1), 4)
    for lag in ACROSS_IMAGES:
        values[f"images, lag {lag}"] = (noise[lag:] * noise[:-lag], 1.0)
    return values


def bits_p_value() -> float:
    """Each of the 32 bits of a word is set as often as not."""
    words = random_bits(*place(1), ELEMENTS, Stream.NOISE).cpu().numpy()
    counts = np.array([np.count_nonzero(words >> bit & 1) for bit in range(32)])
    statistic = ((counts - words.size / 2) ** 2 / (words.size / 4)).sum()
    return float(stats.chi2.sf(statistic, 32))


if __name__ == "__main__":
    main()
