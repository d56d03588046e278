"""Training sequences from a data set, in an order that the seed and a running number alone decide."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import default_collate

from nam56r.data import DataInfo


class Samples:
    """Megatron's GPTDataset, epoch after epoch.

    Sample n is sequence n mod (one epoch's length) of epoch n div it, and each epoch shuffles anew, so that neither
    the number of steps nor a restart changes what comes when. The shuffled indices are kept under `cache`.
    """

    def __init__(self, data: DataInfo, seq_length: int, seed: int, cache: Path):
        """data: from nam56r.data.open. Raises ValueError when it is shorter than one sequence and its last label."""
        if data.tokens < seq_length + 1:
            raise ValueError(
                f"{data.prefix} has {data.tokens} tokens, but one sequence with its last label takes {seq_length + 1}: "
                "use more data or a shorter seq_length"
            )
        self.data, self.seq_length, self.seed, self.cache = data, seq_length, seed, cache
        self._tokenizer = data.tokenizer.load()
        self._epochs = {0: self._build(0)}
        self._length = len(self._epochs[0])

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return self._length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """tokens, labels, position_ids [S] int64 and loss_mask [S] fp32 of a sample; number counts over epochs."""
        epoch, index = divmod(number, len(self))
        self._open(epoch, epoch)
        return self._epochs[epoch][index]

    def microbatch(self, first: int, size: int) -> dict[str, torch.Tensor]:
        """This data-parallel rank's `size` samples of the microbatch that starts at sample `first`: each [size, S]."""
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        # an epoch may end between two ranks' samples, and all ranks open the next one together
        self._open(first // len(self), (first + size * ranks - 1) // len(self))
        mine = range(first + rank * size, first + (rank + 1) * size)
        places = (divmod(number, len(self)) for number in mine)
        return default_collate([self._epochs[epoch][index] for epoch, index in places])

    def _open(self, first: int, last: int) -> None:
        """Have these epochs open, and no others."""
        self._epochs = {
            epoch: self._epochs[epoch] if epoch in self._epochs else self._build(epoch)
            for epoch in range(first, last + 1)
        }

    def _build(self, epoch: int) -> GPTDataset:
        """All ranks call this together: rank 0 writes the indices, the others read them."""
        whole, unfinished = self.cache / f"epoch-{epoch:04d}", self.cache / f"epoch-{epoch:04d}.tmp"
        first = torch.distributed.get_rank() == 0
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        torch.distributed.barrier()
        found = whole.is_dir()
        config = GPTDatasetConfig(
            random_seed=self.seed + epoch,
            sequence_length=self.seq_length,
            blend=([self.data.prefix], None),
            split="1,0,0",
            path_to_cache=str(whole if found else unfinished),
            tokenizer=self._tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        dataset, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
        torch.distributed.barrier()
        if first and not found:
            unfinished.rename(whole)
        return dataset
