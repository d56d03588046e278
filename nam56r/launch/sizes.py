"""The checks of sizes: layout, pipeline, processes, experts, tensor parallelism, batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from nam56r.launch.facts import ARGUMENTS, Check, Facts
from nam56r.launch.profile import MOST


def layout(f: Facts) -> Iterator[Check]:
    """The layout, its segments and what they put on each pipeline rank."""
    p, own = f.profile, f.recipe.layers
    if p.layout is not None:
        yield Check(
            name="layout",
            passed=f.layout_fault is None,
            value=f.layout_fault or p.layout,
            rule="a layout has the recipe's own layers, with | between stages",
            remedy="layout = null",
        )
    stated = {
        "depth": (p.depth, f.recipe.depth),
        "r_layer_indices": (p.r_layer_indices, own.numbers("R")),
        "dsa_ranks": (p.dsa_ranks, f.recipe.dsa.ranks),
        "mtp_depths": (p.mtp_depths, f.recipe.mtp.num_depths),
    }
    for name, (asked, has) in stated.items():
        if asked is not None:
            has = list(has) if isinstance(has, tuple) else has
            asked = list(asked) if isinstance(asked, tuple) else asked
            yield Check(
                name=name,
                passed=asked == has,
                value=f"{name} = {asked}",
                rule=f"the recipe {f.recipe.name} decides it: {has}",
                remedy=f"{name} = {has}; or {name} = null",
            )
    segments = p.layout.count("|") + 1 if f.layout_fault else len(f.segments)
    wanted = f.wanted_segments
    split = "an even split" if p.layout is None and segments == wanted and segments > 1 else "the layout"
    even = p.layout is None and len(own.segments) == 1
    fits = (lambda n: not f.recipe.depth % (n * p.vpp)) if even else (lambda n: n * p.vpp == segments)
    remedies = _alternatives("pp", _near(p.pp, fits, f.recipe.depth))
    if wanted <= f.recipe.depth:
        remedies.append(f"layout = {_nearly_even(own.layers, wanted)}")
    yield Check(
        name="segments",
        passed=segments == wanted,
        value=f"{segments} pipeline segment{'s' * (segments != 1)} by {split}, pp {p.pp} · vpp {p.vpp} = {wanted}",
        rule=f"one segment for each stage: Megatron takes vpp from the number of | ({ARGUMENTS}); an even split needs "
        f"depth {f.recipe.depth} to divide by pp · vpp",
        remedy="; or ".join(remedies or [f"pp = {segments}, vpp = 1"]),
    )
    yield Check(
        name="virtual pipeline",
        passed=p.vpp == 1 or p.pp > 1,
        value=f"vpp {p.vpp} with pp {p.pp}",
        rule="virtual stages interleave those of several ranks (megatron/core/parallel_state.py)",
        remedy="vpp = 1",
    )
    if p.pp > 1 and segments == wanted and f.layout_fault is None:
        yield from _on_every_rank(f)
        if f.recipe.carries_indices(f.segments):
            yield Check(
                name="shared indices",
                passed=f.translation.stack_spec is not None,
                value=f"they travel between stages: {f.recipe.dsa.top_k} of 32 bits beside each token's "
                f"{f.recipe.hidden_size} features",
                rule="Megatron's own layers don't hand indices to another stage "
                "(megatron/core/transformer/experimental_attention_variant/dsa.py), ours do",
                remedy="pp = 1, vpp = 1; or a layout whose stages begin with a sparse layer that computes indices",
            )
    if f.recipe.mtp.num_depths:
        last = f"rank {p.pp - 1}, segment {segments} of {segments}"
        yield Check(
            name="MTP",
            passed=True,
            value=f"{f.recipe.mtp.num_depths} depths on the last stage ({last})",
            rule="Megatron puts MTP on the last stage where the pattern has the suffix "
            "(megatron/core/transformer/multi_token_prediction.py)",
        )


def _on_every_rank(f: Facts) -> Iterator[Check]:
    """Families whose losses Megatron logs with a reduction over the pipeline that only ranks with such a layer enter."""
    with_indexer = " with an indexer" * f.recipe.shares_indices
    logged = {
        "E": (f.recipe.layers.numbers("E") if f.recipe.moe.aux_loss_coeff else (), "", "auxiliary loss"),
        "sparse A": (f.recipe.indexer_layers if f.recipe.dsa.loss_coeff else (), with_indexer, "indexer's loss"),
    }
    for family, (layers, which, loss) in logged.items():
        if not layers:
            continue
        counts = [
            sum(n in layers for part in f.segments[rank :: f.profile.pp] for n in part) for rank in range(f.profile.pp)
        ]
        yield Check(
            name=f"{family} on every stage",
            passed=all(counts),
            value=f"{family} layers{which} by pipeline rank: {', '.join(map(str, counts))}",
            rule=f"the log's sum of the {loss} hangs where a rank has none of them "
            "(megatron/training/training.py, training_log)",
            remedy=f"pp = 1, vpp = 1; or a layout with one on every rank; or a recipe without the {loss}",
        )


def processes(f: Facts) -> Iterator[Check]:
    """Processes, expert parallelism and nodes."""
    p = f.profile
    together = p.tp * p.pp * p.cp
    yield Check(
        name="processes",
        passed=f.data_parallel is not None,
        value=f"tp {p.tp} · pp {p.pp} · cp {p.cp} = {together} for nodes {p.nodes} · gpus_per_node {p.gpus_per_node} = "
        f"{p.processes}",
        rule="tp · pp · cp divides the processes (megatron/core/parallel_state.py)",
        remedy="; or ".join(
            [
                *_alternatives("gpus_per_node", _near(p.gpus_per_node, lambda n: not n * p.nodes % together, 4096)),
                *_alternatives("tp", _near(p.tp, lambda n: not p.processes % (n * p.pp * p.cp), p.processes)),
            ]
        ),
    )
    if p.ep > 1:
        experts = f.recipe.moe.num_experts if "E" in f.recipe.layers.layers else 0
        fits = _near(p.ep, lambda n: not experts % n and not p.processes % (n * p.pp), max(experts, 1))
        yield Check(
            name="experts",
            passed=experts > 0 and not experts % p.ep and not p.processes % (p.ep * p.pp),
            value=f"ep {p.ep}, {experts} experts, ep · pp = {p.ep * p.pp} for {p.processes} processes",
            rule=f"ep divides the experts ({ARGUMENTS}), and ep · pp the processes (megatron/core/parallel_state.py)",
            remedy="; or ".join(_alternatives("ep", fits) or ["ep = 1"]),
        )
    yield Check(
        name="nodes",
        passed=(p.nodes == 1) == (p.rendezvous is None),
        value=f"{p.nodes} node{'s' * (p.nodes > 1)}, rendezvous {p.rendezvous or 'none'}",
        rule="several nodes meet at one HOST:PORT, and one node nowhere",
        remedy="rendezvous = null" if p.nodes == 1 else "rendezvous = node0:29500; or nodes = 1, rendezvous = null",
    )


def tensor_parallel(f: Facts) -> Iterator[Check]:
    """What is split over tensor- and context-parallel ranks."""
    p = f.profile

    fits = _near(p.tp, lambda n: not p.processes % (n * p.pp * p.cp) and not f.indivisible(n), 1024)
    yield Check(
        name="tensor parallel",
        passed=not f.indivisible(p.tp),
        value="; ".join(f.indivisible(p.tp)) or f"tp {p.tp} divides all that is split",
        rule="heads, groups, latents, widths and vocabulary are split over tp, and the sequence with them (sequence parallelism)",
        remedy="; or ".join(_alternatives("tp", fits) or ["tp = 1"]),
    )
    if p.tp > 1 and "R" in f.recipe.layers.layers:
        yield Check(
            name="R under tp",
            passed=True,
            value=f"{f.recipe.m2rnn.num_heads} heads on each of the {p.tp} ranks",
            rule="M²RNN isn't split: each rank has all of it, and computes the same",
        )
    if p.cp > 1:
        length = f.recipe.seq_length
        split = "" if not length % (2 * p.cp) else f"; and seq_length {length} doesn't divide by 2 · cp ({ARGUMENTS})"
        yield Check(
            name="context parallel",
            passed=False,
            value=f"cp {p.cp}",
            rule=f"our layers take whole sequences: the scans and the sparse attention don't cross ranks yet{split}",
            remedy="cp = 1",
        )


def batch(f: Facts) -> Iterator[Check]:
    """The global batch, and the microbatches of an interleaved pipeline."""
    p = f.profile
    if f.data_parallel is None:
        yield Check(
            name="batch",
            passed=False,
            value=f"global_batch {p.global_batch}, micro_batch {p.micro_batch}",
            rule="global_batch = micro_batch · data-parallel processes · k, where data-parallel = processes / (tp · pp · cp)",
            remedy="what the check of the processes says, first",
        )
        return
    together = p.micro_batch * f.data_parallel
    yield Check(
        name="batch",
        passed=f.microbatches is not None,
        value=f"global_batch {p.global_batch} over micro_batch {p.micro_batch} · {f.data_parallel} data-parallel = {together}",
        rule="global_batch = micro_batch · data-parallel processes · k (megatron/core/num_microbatches_calculator.py)",
        remedy="; or ".join(_multiples("global_batch", p.global_batch, together) or ["micro_batch = 1"]),
    )
    if p.vpp > 1 and f.microbatches is not None:
        yield Check(
            name="interleaving",
            passed=not f.microbatches % p.pp,
            value=f"{f.microbatches} microbatches, pp {p.pp}",
            rule="with virtual stages the microbatches are a multiple of pp (megatron/core/pipeline_parallel/schedules.py)",
            remedy="; or ".join([*_multiples("global_batch", p.global_batch, together * p.pp), "vpp = 1"]),
        )


def _nearly_even(layers: str, segments: int) -> str:
    """Layers in so many segments, of sizes that differ by one at most, the longer ones first."""
    size, longer = divmod(len(layers), segments)
    rest = iter(layers)
    return "|".join("".join(islice(rest, size + (i < longer))) for i in range(segments))


def _near(asked: int, fits: Callable[[int], bool], most: int) -> list[int]:
    """The nearest sizes below and above `asked` that fit, up to `most`."""
    below = next((n for n in range(min(asked - 1, most), 0, -1) if fits(n)), None)
    above = next((n for n in range(asked + 1, min(most, 2 * asked + 64) + 1) if fits(n)), None)
    return [n for n in (below, above) if n is not None]


def _alternatives(key: str, values: Iterable[int]) -> list[str]:
    return [f"{key} = {value}" for value in values]


def _multiples(key: str, asked: int, step: int) -> list[str]:
    """The nearest multiples of step below and above, that a profile can have."""
    below = asked // step * step
    return _alternatives(key, [n for n in (below, below + step) if 1 <= n <= MOST])
