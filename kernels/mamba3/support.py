"""The kernels of mamba3_scan, best first."""

from nam56r.kernels.mamba3 import reference
from nam56r.kernels.registry import Kernel

KERNELS = (Kernel("mamba3_scan", "reference", reference.mamba3_scan, role="development"),)
