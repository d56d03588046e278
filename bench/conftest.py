"""`pytest bench/`: the `measure` fixture, results/<device>.json, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bench.measure
import bench.peers
from bench.record import RESULTS, Record, merge, path_of, table

records = pytest.StashKey[list[Record]]()
skipped = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=RESULTS, help="folder of <device>.json (default: bench/results)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[records] = []
    config.stash[skipped] = {}
    bench.peers.register_all()


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[..., list[Record]]:
    """measure(op, case, kernel, run, grad=, flops=, moved=, floor_ms=, peers=): times, records, gives the records.

    run(name) runs the operator with the kernel of that name. See bench.measure.case.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: only times measured on a GPU are recorded")
    config = request.config

    def run(*arguments, **options) -> list[Record]:
        new, missing = bench.measure.case(*arguments, **options)
        config.stash[records].extend(new)
        config.stash[skipped].update(missing)
        merge(path_of(config.getoption("--results"), new[0]["device"]), new)
        return new

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    new = config.stash[records]
    if not new:
        return
    terminalreporter.section("measured")
    for line in table(new):
        terminalreporter.write_line(line)
    for peer, why in config.stash[skipped].items():
        terminalreporter.write_line(f"{peer} skipped: {why}")
    terminalreporter.write_line(f"in {path_of(config.getoption('--results'), new[0]['device'])}")
