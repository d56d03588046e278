"""The kernels of mamba2_scan, best first."""

from nam56r.kernels.mamba2 import reference
from nam56r.kernels.registry import Kernel

KERNELS = (Kernel("mamba2_scan", "reference", reference.mamba2_scan, role="development"),)
