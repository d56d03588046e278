"""Runs for test_train.py, each in a process of its own that it may kill: python train_worker.py RUNS.json.

RUNS.json is a list of {"name", "options", "kill", "ranks"}; name.json gets {"codes", "said"}. Everything is imported once
and every run is a fork, so that a dozen real runs take seconds.
"""

import functools
import io
import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from nam56r.kernels.dsa.status import flag
from nam56r.megatron.samples import Samples
from nam56r.recipe import Recipe
from nam56r.train import TrainOptions, run

SMALL = (
    "pattern=AEMRA depth=5 dsa.ranks=[0] hidden_size=32 ffn_hidden_size=48 vocab_size=512 seq_length=16 "
    "mla.num_heads=2 mla.q_lora_rank=16 mla.kv_lora_rank=16 mla.qk_nope_head_dim=16 mla.qk_rope_head_dim=8 "
    "mla.v_head_dim=16 dsa.top_k=8 dsa.index_num_heads=2 dsa.index_head_dim=16 "
    "mamba.headdim=16 mamba.d_state=16 mamba.ngroups=2 mamba.mimo_rank=2 "
    "moe.num_experts=4 moe.top_k=2 moe.ffn_hidden_size=32 moe.shared_ffn_hidden_size=32 "
    "m2rnn.num_heads=2 m2rnn.k_head_dim=16 m2rnn.v_head_dim=16 mtp.num_depths=1"
)


def small_recipe() -> Recipe:
    """Every letter, sparse and dense A, and an MTP depth, at sizes where a step takes a tenth of a second."""
    return Recipe.load("nam56r-tiny").with_overrides(SMALL.split())


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def arrange(kill: str) -> None:
    """Where to die: "read 7" while sample 7 is read, "write 2" in the middle of the second checkpoint's file;
    "stop 7" asks to stop, as Ctrl-C does, at sample 7; at "score 7" the second process has
    an index score that is NaN."""
    moment, number = kill.split()
    if moment in ("read", "stop", "score"):
        read = Samples.microbatch

        def microbatch(self: Samples, first: int, size: int) -> dict:
            if first <= int(number) < first + size:
                if moment == "score":
                    flag(torch.device("cpu")).fill_(int(os.environ["RANK"]))  # of the second process only
                else:
                    die(signal.SIGKILL if moment == "read" else signal.SIGINT)
            return read(self, first, size)

        Samples.microbatch = microbatch
    elif moment == "write":
        write, streams = filesystem_async._write_item, []

        @functools.wraps(write)
        def write_item(*arguments, **options):
            stream = next(a for a in arguments if isinstance(a, io.IOBase))
            if stream not in streams:
                streams.append(stream)
            result = write(*arguments, **options)
            if len(streams) == int(number) and stream.tell() > 4096:
                stream.flush()
                die()
            return result

        filesystem_async._write_item = write_item


def child(options: dict, kill: str | None, rank: int, ranks: int, port: int, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if kill:
        arrange(kill)
    try:
        outcome = run(TrainOptions(recipe=small_recipe(), **options))
        print(f"outcome {outcome}", flush=True)
        os._exit(10 if outcome.interrupted else 0)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)


def main(runs: Path) -> None:
    for wanted in json.loads(runs.read_text()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks, log = wanted.get("ranks", 1), runs.with_name(f"{wanted['name']}.log")
        children = []
        for rank in range(ranks):
            process = os.fork()
            if process == 0:
                child(wanted["options"], wanted.get("kill"), rank, ranks, port, log)
            children.append(process)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children]
        runs.with_name(f"{wanted['name']}.json").write_text(json.dumps({"codes": codes, "said": log.read_text()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
