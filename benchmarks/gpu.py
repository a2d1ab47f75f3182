"""What the project needs to know of a GPU, in sections of a few minutes.

Run: ``python benchmarks/gpu.py SECTION [--seconds N]``.

    first     what everything rests on: copy and product rates, attention by backend, noise bits,
              no waiting, repeatability, the tests of the kernels
    defaults  what choices rest on that were made by counts: CUDA graphs, memory, layout of U-Nets,
              noise
    xl        a ladder of DiT-XL/2 at 256 images a step, and DiT-S/2
    tune      launch parameters of adaLN's, GELU's and attention's, at the sizes of DiT-XL/2
    train     whole runs: one that is killed and resumed, and digits with FID
    arena     methods compared on CIFAR-10 at 16 x 16 pixels, whose shards lie in shards/cifar16 and
              shards/cifar16-test; the report is in comparisons/cifar16-gpu

Rows come in the order of their worth. One that would not end in the section's seconds is left out,
one that takes longer than was thought is interrupted where they end, if need be with the process;
the result file is rewritten after each, so that a kill loses one row at most.
"""

import argparse
from collections.abc import Callable

import torch

import gpu_arena
import gpu_defaults
import gpu_first
import gpu_train
import gpu_tune
import gpu_xl
from gpu_rows import Rows
from harness import result_path

SECTIONS: dict[str, tuple[Callable[[Rows], None], int]] = {
    "first": (gpu_first.measure, 200),
    "defaults": (gpu_defaults.measure, 200),
    "xl": (gpu_xl.measure, 400),
    "tune": (gpu_tune.measure, 60),
    "train": (gpu_train.measure, 150),
    "arena": (gpu_arena.measure, 450),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What the project needs to know of a GPU.")
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("--seconds", type=float, help="that the section may take")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No GPU: there is nothing to measure here.")
    measure, seconds = SECTIONS[options.section]
    measure(Rows(result_path(f"gpu_{options.section}"), options.seconds or seconds))


if __name__ == "__main__":
    main()
