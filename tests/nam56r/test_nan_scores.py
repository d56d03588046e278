"""NaN index scores end a run where it logs: in both entries, and nowhere else."""

from types import SimpleNamespace

import pytest
import torch

from nam56r.kernels.dsa import index_top_k
from nam56r.kernels.dsa.status import nan_scores
from nam56r.megatron.nan_scores import on_any_rank, stopping
from nam56r.megatron.parallel import destroy, initialize


@pytest.fixture(scope="module", autouse=True)
def groups():
    initialize("cpu", seed=5)
    yield
    destroy()


def meet_nan():
    q, k, weights = torch.ones(1, 4, 2, 8), torch.ones(1, 4, 8), torch.ones(1, 4, 2)
    k[0, 2] = torch.nan
    assert (index_top_k(q, k, weights, 4)[0, 3] == torch.tensor([0, 1, 3, -1])).all()


def test_it_is_asked_once():
    nan_scores("cpu")
    assert not on_any_rank(torch.device("cpu"))
    meet_nan()
    assert on_any_rank(torch.device("cpu")) and not on_any_rank(torch.device("cpu"))


def test_megatrons_log_ends_the_run(monkeypatch):
    import megatron.training

    monkeypatch.setattr(megatron.training, "get_args", lambda: SimpleNamespace(log_interval=3))
    nan_scores("cpu")
    logged = []

    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, *, pg_collection=None):
        logged.append((iteration, loss_scale, pg_collection))
        return "report"

    log = stopping(training_log)
    assert log.__name__ == "training_log"
    for iteration in (1, 2, 3):
        assert log({}, {}, 0.1, iteration, 1.0, pg_collection="groups") == "report"
    meet_nan()
    assert log({}, {}, 0.1, 4, 1.0) == log({}, {}, 0.1, 5, 1.0) == "report"
    with pytest.raises(
        RuntimeError, match="an index score of sparse attention is NaN, in one of the last 3 iterations"
    ):
        log({}, {}, 0.1, 6, 1.0)
    assert logged == [
        (1, 1.0, "groups"),
        (2, 1.0, "groups"),
        (3, 1.0, "groups"),
        (4, 1.0, None),
        (5, 1.0, None),
        (6, 1.0, None),
    ]
