"""The kernels of m2rnn, best first."""

from nam56r.kernels.m2rnn import reference
from nam56r.kernels.registry import Kernel

KERNELS = (Kernel("m2rnn", "reference", reference.m2rnn, role="development"),)
