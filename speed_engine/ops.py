"""The operators that have a kernel. Only this module imports ``speed_kernels``."""

from speed_kernels.noising import noised_input_reference as noised_input
from speed_kernels.philox import SPECIFICATION, Stream, normal, random_bits
from speed_kernels.variational_bound import variational_bound_reference as variational_bound
from speed_kernels.weighted_mse import weighted_mse_reference as weighted_mse

__all__ = [
    "SPECIFICATION",
    "Stream",
    "noised_input",
    "normal",
    "random_bits",
    "variational_bound",
    "weighted_mse",
]
