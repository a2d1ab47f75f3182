"""One step of many averages at once: of parameters in EMAs, of gradients in momenta."""

import torch
from torch import Tensor


def lerp_in_one_kernel(
    averages: list[Tensor], parameters: list[Tensor], share: float, found_inf: Tensor | None
) -> None:
    """average + share (parameter - average), in one launch for all tensors.

    A weight on the device would cost ``torch._foreach_lerp_`` a launch per tensor on CUDA, since
    tensors that differ in shape leave its fast path. This is the fused step of SGD on
    (average - parameter)**2 / 2, which reads on the device whether it is skipped: the gradient is
    the weight decay of the average, minus the parameter.

    Args:
        averages: change.
        parameters: of the same shapes, and laid out as they are.
        share: of the parameters.
        found_inf: () float, 1 where nothing is to change; None changes.
    """
    torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
        averages, parameters, [], weight_decay=1.0, momentum=0.0, lr=share, dampening=0.0,
        nesterov=False, maximize=True, is_first_step=False, found_inf=found_inf,
    )  # fmt: skip
