"""The kernels of rms_norm, best first."""

from nam56r.kernels.norm import library, reference
from nam56r.kernels.registry import Kernel

KERNELS = (
    Kernel("rms_norm", "torch", library.rms_norm),
    Kernel("rms_norm", "reference", reference.rms_norm, role="development"),
)
