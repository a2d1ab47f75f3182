"""The GPUs that runs are planned for, as NVIDIA states them."""

import re
from typing import Literal, NamedTuple

GpuName = Literal["a100", "h100", "h200", "b200", "l40s", "a6000", "rtx4090"]


class Gpu(NamedTuple):
    """One device and its links."""

    bf16_flops: float  # per second, dense matrix products with float32 accumulation
    bandwidth: float  # bytes per second
    memory: float  # bytes
    node_link: float  # bytes per second to the devices of its node, in one direction
    network_link: float  # bytes per second to those of other nodes, in one direction


# Rates and memory from the data sheet of each (SXM where there are several; half of the rates "with
# sparsity"). Links: half of NVLink's two-way rate, PCIe 4.0 x16 for cards without it; one network
# adapter per device, as in DGX systems: 200 Gb/s with A100, 400 Gb/s with H100 and later.
GPUS: dict[GpuName, Gpu] = {
    "a100": Gpu(312e12, 2.039e12, 80e9, 300e9, 25e9),
    "h100": Gpu(989.5e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989.5e12, 4.8e12, 141e9, 450e9, 50e9),
    "b200": Gpu(2250e12, 8e12, 180e9, 900e9, 50e9),
    "l40s": Gpu(362.05e12, 0.864e12, 48e9, 32e9, 25e9),
    "a6000": Gpu(154.8e12, 0.768e12, 48e9, 32e9, 25e9),  # what the SpeeD paper trained on
    "rtx4090": Gpu(165.2e12, 1.008e12, 24e9, 32e9, 25e9),
}


def gpu_called(name: str) -> Gpu | None:
    """The GPU that PyTorch calls so, such as ``NVIDIA GeForce RTX 4090``; None if it is another."""
    # An RTX A1000 is no A100, a GH200 no H200; the GPUs of a GB200 are B200s.
    words = name.lower().replace("rtx 4090", "rtx4090").replace("gb200", "b200")
    return next((gpu for known, gpu in GPUS.items() if re.search(rf"\b{known}(?!\d)", words)), None)
