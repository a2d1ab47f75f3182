"""Whether the host holds a training step up: seconds to launch it, and to compute it, by estimate.

Fitted to DiT-S/2 with 256 images a step on an H200 (benchmarks/README.md, "On an H200"), of 131
parameter tensors in 12 blocks: launched block by block the step takes the host 63 ms, replayed as
CUDA graphs it takes the device 32 ms, and compiling the model whole takes 14 s longer than its
blocks. Launches are counted to grow with the number of parameter tensors: 5 to 7 each.
"""

from torch import Tensor, nn

from speed_engine.config import TrainConfig
from speed_engine.planning.flops import forward_flops
from speed_engine.planning.gpus import Gpu
from speed_engine.runtime.machine import Launching

HOST_SECONDS = 0.48e-3  # per parameter tensor and forward pass of a step; its backward included
COMPILE_SECONDS = 0.107  # more for the whole model than for its blocks; per tensor and pass, too
SMALL_EFFICIENCY = 0.29  # of the peak rate, which small models reach


def launching(
    config: TrainConfig, model: nn.Module, passes: list[dict[str, Tensor]], gpu: Gpu
) -> Launching | None:
    """Of a step of a run in one process.

    Args:
        config: of the run.
        model: of the run, on any device, also the meta device.
        passes: its arguments for one image, in every forward pass of a step.
        gpu: that computes it.

    Returns:
        None where CUDA graphs are no choice: an MDT or a U-Net, since none was measured with them;
        images that go through the model in parts, since a replay overwrites the gradients of the
        part before; deterministic algorithms, of which PyTorch captures only some.
    """
    in_parts = (config.microbatch_size or config.batch_size) < config.batch_size
    if in_parts or config.deterministic or not config.model.GRAPHS:
        return None
    flops = 3 * config.batch_size * sum(forward_flops(model, inputs) for inputs in passes)
    launched = len([*model.parameters()]) * len(passes)
    return Launching(
        host_seconds=HOST_SECONDS * launched,
        device_seconds=flops / (SMALL_EFFICIENCY * gpu.bf16_flops),
        compile_seconds=COMPILE_SECONDS * launched,
    )
