"""The kernels of mamba2_scan, best first."""

from nam56r.kernels.mamba2 import cuda, reference
from nam56r.kernels.registry import Kernel, Problem
from nam56r.kernels.ssd import support
from nam56r.kernels.ssd.sizes import MAMBA2


def _cuda_refuses(problem: Problem) -> tuple[str, ...]:
    return support.refuses(problem, MAMBA2, 1, None)


KERNELS = (
    Kernel("mamba2_scan", "cuda", cuda.mamba2_scan, _cuda_refuses),
    Kernel("mamba2_scan", "reference", reference.mamba2_scan, role="development"),
)
