"""Every test starts from one thread and one seed; gpu tests are skipped where there is no CUDA device."""

import numpy
import pytest
import torch

from nam56r.kernels import triton_runtime

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    numpy.random.seed(0)


@pytest.fixture
def poisoned():
    """Memory that nobody wrote holds NaN."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]


@pytest.fixture
def interpreter():
    """Triton kernels run in Triton's interpreter, also on a CPU, when they are asked for by name."""
    with triton_runtime.interpreter():
        yield


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def deterministic_as_before():
    """Megatron's --deterministic-mode is for the process, and what PyTorch gives cuDNN depends on it."""
    was = torch.are_deterministic_algorithms_enabled()
    yield
    if torch.are_deterministic_algorithms_enabled() != was:
        torch.use_deterministic_algorithms(was)
