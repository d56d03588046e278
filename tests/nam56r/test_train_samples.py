"""The order of the training sequences: epochs, restarts, data-parallel ranks."""

import pytest
import torch

from nam56r import data
from nam56r.megatron import samples as module
from nam56r.megatron.parallel import destroy, initialize
from nam56r.megatron.samples import Samples

SEQ = 8


@pytest.fixture
def info(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(5):
        (tmp_path / "texts" / f"{number}.txt").write_text("".join(chr(97 + (i + number) % 26) for i in range(60)))
    data.build([tmp_path / "texts"], tmp_path / "data")
    initialize("cpu")
    yield data.open(tmp_path / "data")
    destroy()


def test_every_epoch_has_each_sequence_once_in_a_new_order(info, tmp_path):
    samples = Samples(info, SEQ, 1, tmp_path / "index")
    assert len(samples) == (info.tokens - 1) // SEQ
    epochs = [[samples[e * len(samples) + n]["tokens"] for n in range(len(samples))] for e in range(3)]
    assert all(one["labels"][:-1].equal(one["tokens"][1:]) for one in [samples[3]])
    orders = [[tuple(tokens.tolist()) for tokens in epoch] for epoch in epochs]
    assert len({tuple(order) for order in orders}) == 3
    # documents are shuffled too, so the cuts between sequences move, but no token comes twice in an epoch
    counts = [torch.stack(epoch).flatten().bincount(minlength=512) for epoch in epochs]
    assert all(int((count - counts[0]).abs().sum()) <= 2 * SEQ for count in counts)


def test_a_restart_finds_the_same_samples_and_its_indices(info, tmp_path, monkeypatch):
    first = Samples(info, SEQ, 1, tmp_path / "index")
    number = 2 * len(first) + 3
    wanted = first[number]
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == ["epoch-0000", "epoch-0002"]
    (tmp_path / "index" / "epoch-0002").rename(tmp_path / "index" / "epoch-0002.tmp")
    for half in (tmp_path / "index" / "epoch-0002.tmp").glob("*.npy"):
        half.write_bytes(half.read_bytes()[:50])  # as a killed run leaves them
    again = Samples(info, SEQ, 1, tmp_path / "index")
    assert all(again[number][name].equal(wanted[name]) for name in wanted)
    assert not again[number]["tokens"].equal(Samples(info, SEQ, 2, tmp_path / "other")[number]["tokens"])


def test_ranks_take_their_part_of_a_microbatch(info, tmp_path, monkeypatch):
    samples = Samples(info, SEQ, 1, tmp_path / "index")
    monkeypatch.setattr(module.parallel_state, "get_data_parallel_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(module.parallel_state, "get_data_parallel_rank", lambda rank=rank: rank)
        parts.append(samples.microbatch(4, 3))
    batch = torch.cat([part["tokens"] for part in parts])
    assert batch.equal(torch.stack([samples[n]["tokens"] for n in range(4, 10)]))
    assert parts[0]["loss_mask"].shape == (3, SEQ) and parts[0]["position_ids"][0].equal(torch.arange(SEQ))


def test_all_ranks_open_an_epoch_together(info, tmp_path, monkeypatch):
    """Building its indices waits for every rank, also for one whose own samples are all of the epoch before."""
    monkeypatch.setattr(module.parallel_state, "get_data_parallel_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(module.parallel_state, "get_data_parallel_rank", lambda rank=rank: rank)
        samples = Samples(info, SEQ, 1, tmp_path / f"index{rank}")
        built = []
        monkeypatch.setattr(
            samples, "_build", lambda epoch, build=samples._build: (built.append(epoch), build(epoch))[1]
        )
        samples.microbatch(len(samples) - 1, 1)
        samples.microbatch(len(samples) + 1, 1)
        samples.microbatch(3 * len(samples) - 1, 1)
        assert built == [1, 2, 3]


def test_too_little_data_is_refused(info, tmp_path):
    with pytest.raises(ValueError, match=f"has {info.tokens} tokens, but one sequence with its last label takes 1001"):
        Samples(info, 1000, 1, tmp_path / "index")
