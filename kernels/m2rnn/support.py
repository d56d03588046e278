"""The kernels of m2rnn, best first."""

from nam56r.kernels import extension
from nam56r.kernels.m2rnn import cuda, reference
from nam56r.kernels.registry import Kernel, Problem


def _cuda_refuses(problem: Problem) -> tuple[str, ...]:
    missing = extension.missing(problem)
    if missing:
        return missing
    if not cuda.REGISTERED:
        return ("CUDA extension built from older sources, without m2rnn: install the package again",)
    q, v, device = problem["q"], problem["v"], problem.device
    keys, columns, reasons = q.shape[-1], v.shape[-1], []
    if device.capability < (8, 0):
        reasons.append(f"{device.name} is sm_{device.capability[0]}{device.capability[1]}, but it takes sm_80 or later")
    if q.dtype not in cuda.ELEMENTS:
        reasons.append(f"q is {q.dtype}, but the CUDA kernel takes bfloat16, float16 or float32")
    if not 1 <= keys <= cuda.MOST_ROWS:
        reasons.append(f"K = {keys}, but the CUDA kernel takes 1 to {cuda.MOST_ROWS}")
    if columns not in cuda.COLUMNS:
        reasons.append(f"V = {columns}, but the CUDA kernel takes {', '.join(map(str, cuda.COLUMNS))}")
    if reasons:
        return tuple(reasons)
    shape = keys, columns, q.dtype, device.capability
    if cuda.chunk_of(*shape) == 0:
        return (f"K = {keys}, V = {columns} in {q.dtype} takes more shared memory than {device.name} has",)
    return cuda.refusal(keys, columns, q.dtype, device.name, device.capability)


KERNELS = (
    Kernel("m2rnn", "cuda", cuda.m2rnn, _cuda_refuses),
    Kernel("m2rnn", "reference", reference.m2rnn, role="development"),
)
