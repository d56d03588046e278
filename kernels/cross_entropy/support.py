"""The kernels of linear_cross_entropy, best first."""

from nam56r.kernels.cross_entropy import library, reference
from nam56r.kernels.registry import Kernel

KERNELS = (
    Kernel("linear_cross_entropy", "torch", library.linear_cross_entropy),
    Kernel("linear_cross_entropy", "reference", reference.linear_cross_entropy, role="development"),
)
