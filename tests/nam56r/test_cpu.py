"""Megatron on the CPU: what stands in for CUDA, and a world of one process."""

import logging
from pkgutil import resolve_name

import pytest
import torch
from megatron.core import parallel_state

from nam56r.megatron import cpu
from nam56r.megatron.parallel import data_parallel, destroy, initialize, pick_device
from nam56r.megatron.patches import patches_of


@pytest.fixture
def cuda_as_it_was(monkeypatch):
    """Undoes the stand-ins, so that other tests find torch as it is."""
    for patch in patches_of("cpu"):
        monkeypatch.setattr(patch.target, resolve_name(patch.target))


@pytest.fixture
def out_of_cpu_mode(cuda_as_it_was, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("torch's own was asked"))
    torch.compiler.set_stance("default")


def test_cpu_mode_says_so_once(out_of_cpu_mode, caplog):
    assert not cpu.is_on()
    with caplog.at_level(logging.INFO, "nam56r"):
        cpu.cpu_mode()
        cpu.cpu_mode()
    assert cpu.is_on()
    (said,) = [record.getMessage() for record in caplog.records]
    assert all(patch.target in said and patch.verify() for patch in patches_of("cpu"))
    assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    torch.cuda.synchronize()


def test_cpu_mode_refuses_where_cuda_is_in_use(out_of_cpu_mode, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is already in use in this process"):
        cpu.cpu_mode()
    assert not cpu.is_on()


def test_a_world_of_one_can_be_made_again(cuda_as_it_was, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    drawn = []
    for _ in range(2):
        assert initialize("cpu", seed=7) == torch.device("cpu")
        assert torch.distributed.get_backend() == "gloo" and torch.distributed.get_world_size() == 1
        assert parallel_state.get_data_parallel_world_size() == 1
        drawn.append(torch.rand(3))
        destroy()
        assert not torch.distributed.is_initialized()
    assert torch.equal(*drawn)


def test_sizes_must_divide_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert data_parallel() == 4 and data_parallel(tp=2, ep=2) == 2 and data_parallel(pp=2, ep=2) == 2
    for wrong in ({"tp": 3}, {"ep": 3}, {"tp": 2, "pp": 4}, {"pp": 2, "ep": 4}):
        with pytest.raises(ValueError, match="must divide the number of processes, 4"):
            data_parallel(**wrong)
    with pytest.raises(ValueError, match="ep is 0, but must be at least 1"):
        data_parallel(ep=0)


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="torch finds no CUDA device here"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="device is 'tpu', but must be"):
        pick_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == torch.device("cuda", 3) and pick_device("cpu") == torch.device("cpu")
