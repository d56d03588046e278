"""Why the CUDA scan can't take a problem, for both families."""

from __future__ import annotations

from nam56r.kernels import extension
from nam56r.kernels.registry import Problem
from nam56r.kernels.ssd import code


def refuses(problem: Problem, model: int, rank: int, pairs: int | None) -> tuple[str, ...]:
    """The reasons, all at once; pairs is N_a where something is turned. Empty when the scan can run."""
    missing = extension.missing(problem)
    if missing:
        return missing
    if not code.REGISTERED:
        return ("CUDA extension built from older sources, without the Mamba scan: install the package again",)
    x, d_state, device = problem["x"], problem["B"].shape[-1], problem.device
    headdim, reasons = x.shape[-1], []
    if device.capability != code.CAPABILITY:
        major, minor = device.capability
        reasons.append(f"{device.name} is sm_{major}{minor}, but the CUDA kernel takes sm_90 (H100, H200)")
    if x.dtype not in code.DTYPES:
        reasons.append(f"x is {x.dtype}, but the CUDA kernel takes bfloat16 or float16")
    sizes = (("R", rank, code.RANKS), ("P", headdim, code.HEADDIMS), ("N", d_state, code.STATES))
    for name, size, taken in sizes:
        if size not in taken:
            reasons.append(f"{name} = {size}, but the CUDA kernel takes {', '.join(map(str, taken))}")
    if pairs is not None and 4 * pairs != d_state:
        reasons.append(f"N_a = {pairs} with N = {d_state}, but the CUDA kernel takes N_a = N / 4")
    if reasons:
        return tuple(reasons)
    shape = code.Shape(x.dtype, model, rank, d_state)
    return code.refusal(shape, device.name, device.capability)
