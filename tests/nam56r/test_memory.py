"""The memory estimate, against what a model keeps for its backward and against the published pains."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from nam56r.kernels.dsa import by_key
from nam56r.kernels.dsa import triton as sparse
from nam56r.kernels.dsa import triton_loss as sparse_loss
from nam56r.kernels.m2rnn import cuda
from nam56r.kernels.registry import DEVICES
from nam56r.kernels.ssd import cuda as scan
from nam56r.memory import GIB, Estimate, Held, available, check, estimate, in_flight, stages
from nam56r.parameters import parameters
from nam56r.plan import MEGATRON, PlanRefused, make_plan
from nam56r.recipe import PRESETS
from tests.nam56r.layers import forget_losses

TINY, NAM56R = PRESETS["nam56r-tiny"], PRESETS["nam56r"]


def planned(recipe, device="h200", **options):
    try:
        return make_plan(recipe, DEVICES[device], **options)
    except PlanRefused as refused:
        return refused.plan


def test_weights_gradients_and_optimizer():
    total = sum(total for total, _ in parameters(NAM56R).values())
    half = estimate(NAM56R, planned(NAM56R))
    assert (half.weights, half.gradients, half.optimizer) == (2 * total, 4 * total, 12 * total)
    full = estimate(TINY, planned(TINY, "cpu", dtype=torch.float32))
    count = sum(total for total, _ in parameters(TINY).values())
    assert (full.weights, full.gradients, full.optimizer) == (4 * count, 4 * count, 8 * count)


def test_parallelism_splits_what_it_splits():
    one = estimate(NAM56R, planned(NAM56R))
    tp = estimate(NAM56R, planned(NAM56R, tensor_parallel=2))
    ep = estimate(NAM56R, planned(NAM56R), expert_parallel=4, optimizer_shards=8)
    routed = 22 * 16 * 2 * 896 * 4096
    assert one.weights - ep.weights == 2 * routed * 3 // 4
    # Adam's state of the routed experts is shared by the 8 / 4 devices with the same ones
    assert ep.optimizer == pytest.approx(12 * ((ep.weights / 2 - routed / 4) / 8 + routed / 4 / 2), abs=1000)
    assert tp.activations["m2rnn"] == one.activations["m2rnn"]
    assert tp.activations["mamba"] < one.activations["mamba"]
    whole = 2 * (routed + parameters(NAM56R)["m2rnn"][0] + parameters(NAM56R)["norm"][0])
    assert tp.weights - whole == (one.weights - whole) // 2


def test_batch_and_sequence_and_kernels_count():
    base = estimate(TINY, planned(TINY, "cpu", micro_batch=2))
    more = estimate(TINY, planned(TINY, "cpu", micro_batch=8))
    assert all(more.activations[family] == pytest.approx(4 * size, abs=4) for family, size in base.activations.items())
    longer = TINY.with_overrides(["seq_length=512"])
    assert estimate(longer, planned(longer, "cpu")).activations["moe"] == base.activations["moe"]
    stored = estimate(TINY, planned(TINY, "cpu", micro_batch=2, kernels={"linear_cross_entropy": "reference"}))
    assert stored.logits > base.logits
    fast = estimate(NAM56R, planned(NAM56R))
    for operator in ("latent_attention", "mla_attention"):
        scores = estimate(NAM56R, planned(NAM56R, kernels={operator: "reference"}))
        # fp32, 4 dense slots
        assert scores.activations["attention"] - fast.activations["attention"] > 4 * 4 * 32 * 4096**2


@pytest.mark.parametrize("device", ["h200", "a100"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(64, 16), (17, 32)])
def test_the_recurrence_keeps_the_states_that_its_kernel_saves(device, dtype, sizes):
    """Of an H200 and of a device with shorter chunks; K not a multiple of 16 is saved as if it were."""
    keys, columns = sizes
    recipe = TINY.with_overrides([f"m2rnn.k_head_dim={keys}", f"m2rnn.v_head_dim={columns}"])
    plan = planned(recipe, device, dtype=dtype, micro_batch=2)

    def kept(**kernels):
        slots = tuple(slot.model_copy(update={"kernels": kernels}) for slot in plan.slots)
        return estimate(recipe, plan.model_copy(update={"slots": slots})).activations["m2rnn"]

    q = torch.empty(2, recipe.seq_length, 1, keys, dtype=dtype, device="meta")
    v = q.new_empty(2, recipe.seq_length, recipe.m2rnn.num_heads, columns)
    weight = v.new_empty(recipe.m2rnn.num_heads, columns, columns, dtype=torch.float32)
    chunk = cuda.chunk_of(keys, columns, dtype, DEVICES[device].capability)
    states = cuda._forward_shapes(q, q, v, weight, v[..., 0], None, None, chunk, True)[2]
    assert kept(m2rnn="cuda") - kept() == states.nbytes


@pytest.mark.parametrize("length", [4096, 1000])
@pytest.mark.parametrize(("kind", "rank"), [("mamba3", 8), ("mamba3", 4), ("mamba3", 1), ("mamba2", 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scans_keep_the_states_that_their_kernel_saves(kind, rank, length, dtype):
    """Of the production recipe, and of a length that ends within a span; Mamba-2 doesn't read the rank."""
    recipe = NAM56R.with_overrides([f"mamba.kind={kind}", f"mamba.mimo_rank={rank}", f"seq_length={length}"])
    plan = planned(recipe, dtype=dtype, micro_batch=2)

    def kept(**kernels):
        slots = tuple(slot.model_copy(update={"kernels": kernels}) for slot in plan.slots)
        return estimate(recipe, plan.model_copy(update={"slots": slots})).activations["mamba"]

    x = torch.empty(2, length, 128, 64, dtype=dtype, device="meta")
    dt = torch.empty(2, 128, length, device="meta")
    B = x.new_empty(2, length, rank if kind == "mamba3" else 1, 8, 128)
    angles, mixing = (x.new_empty(2, length, 1, 32), dt.new_empty(128, rank, 64)) if kind == "mamba3" else (None, None)
    A = dt.new_empty(128) if kind == "mamba2" else None
    psi = mixing if rank > 1 else None
    *_, saved, bases, steps, tables = scan._scan_shapes(
        x, B, B, dt, dt, dt, angles, A, A, True, None, None, None, x, psi, psi, psi, None, None, None, True
    )
    own = sum(t.nbytes for t in (saved, bases, steps, tables))
    assert kept(**{f"{kind}_scan": "cuda"}) - kept() == pytest.approx(13 * own, abs=99)


def test_chunked_loss_saves_the_published_logits():
    """Stored, the head's logits of 8 sequences are 8 · 4096 · 131072 numbers: 16 GiB in fp32."""
    chunked = estimate(NAM56R, planned(NAM56R, micro_batch=8))
    stored = estimate(NAM56R, planned(NAM56R, micro_batch=8, kernels={"linear_cross_entropy": "reference"}))
    assert stored.logits >= 3 * 16 * GIB
    assert chunked.logits < 1 * GIB


def test_stored_logits_are_the_published_ones():
    """Published: 12 GiB of logits for the head, 21 GiB for MTP, at micro-batch 4 as bf16 and their fp32 copy."""
    plan = planned(NAM56R, micro_batch=4)
    kernels = {"linear_cross_entropy": MEGATRON}
    whole = plan.model_copy(update={"head": plan.head.model_copy(update={"kernels": kernels})})
    one = 12 * GIB
    assert 4 * 4096 * 131072 * (2 + 4) == one
    gradient = 4 * 4096 * 131072 * 4
    assert estimate(NAM56R, whole).logits == 3 * one + gradient  # the head and two depths
    assert 2 * one == pytest.approx(21 * GIB, rel=0.15)


def test_fast_kernels_keep_nothing_quadratic():
    """Published: 45 GiB of dense index scores. Nothing here grows with S²: twice the sequence keeps twice as much."""
    longer = NAM56R.with_overrides(["seq_length=8192"])
    base, twice = estimate(NAM56R, planned(NAM56R)), estimate(longer, planned(longer))
    for family, size in base.activations.items():
        assert twice.activations[family] == pytest.approx(2 * size, abs=64), family


def test_refuses_what_does_not_fit():
    cpu = DEVICES["cpu"]
    small = Estimate({"moe": Held(1, 2, 3, 4)}, 5, 7, runtime=6)
    assert small.total == 28
    check(small, cpu, 28)
    check(small, cpu, None)
    with pytest.raises(
        ValueError, match=r"not enough memory \(estimated before it starts\): .* GiB free on cpu"
    ) as error:
        check(small, cpu, 20)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not enough memory"):
        check(estimate(NAM56R, planned(NAM56R, micro_batch=64)), DEVICES["h200"], available(DEVICES["h200"]))


def test_available(monkeypatch):
    assert GIB / 8 < available(DEVICES["cpu"]) < 2**50
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available(DEVICES["h200"]) == 141 * GIB


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ((), {}),
        (("mamba.mimo_rank=1",), {}),
        (("mamba.kind=mamba2",), {}),
        ((), {"mla_attention": "torch"}),
        (("dsa.ranks=[0, 1, 2]", "dsa.share_every=3"), {}),
    ],
    ids=["mimo", "siso", "mamba2", "expanded", "shared indices"],
)
def test_activations_are_what_the_model_keeps(settings, kernels):
    """Bytes that autograd saves in a forward of the real model, by layer, within a third of the estimate."""
    recipe = TINY.with_overrides(["seq_length=128", *settings])
    plan = planned(recipe, "cpu", micro_batch=2, dtype=torch.float32, kernels=kernels)
    with built(recipe, plan) as model:
        kept = _kept(model, recipe, plan)
    estimated = estimate(recipe, plan)
    assert estimated.weights == sum(parameter.numel() * 4 for parameter in model.parameters())
    for family in ("attention", "moe", "mamba", "m2rnn", "mtp"):
        assert estimated.activations[family] == pytest.approx(kept[family], rel=1 / 3), family
    assert sum(estimated.activations.values()) == pytest.approx(sum(kept.values()), rel=0.2)


class Keeps(torch.autograd.Function):
    """An operator that keeps some of its inputs; an attention its output, what rounding it lost, and a logsumexp too."""

    @staticmethod
    def forward(ctx, shape, kept, attends, *inputs):
        out = inputs[0].new_empty(shape)
        more = [out, out.new_empty(shape[:-1], dtype=torch.float32)] if attends else []
        if attends and out.dtype != torch.float32:
            more.append(torch.empty_like(out))
        ctx.save_for_backward(*(inputs[i] for i in kept), *more)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("operator", ["latent_attention", "mla_attention"])
def test_dense_attention_keeps_what_its_fast_kernels_do(operator, batch, dtype, monkeypatch):
    recipe = TINY.with_overrides(["seq_length=128", "pattern=A", "depth=2", "dsa.ranks=[]"])
    plan = planned(recipe, "cpu", micro_batch=batch, dtype=dtype, kernels={operator: "reference"})
    attention = "nam56r.megatron.attention."

    def queries(q, cos, sin, *, up, **_):
        width = q.shape[-1] if up is None else up.shape[2] + 2 * cos.shape[1]
        return Keeps.apply((*q.shape[:3], width), [] if up is None else [0], False, q)

    def latents(q_latent, kv, *_, **__):
        return tuple(Keeps.apply(t.shape, [0], False, t) for t in (q_latent, kv))

    monkeypatch.setattr(attention + "mla_queries", queries)
    monkeypatch.setattr(attention + "mla_latents", latents)
    monkeypatch.setattr(
        attention + "latent_attention",
        lambda q, kv, *, value_dim, **_: Keeps.apply((*q.shape[:3], value_dim), [0, 1], True, q, kv),
    )
    monkeypatch.setattr(
        attention + "mla_attention",
        lambda q, k, k_rope, v, **_: Keeps.apply(v.shape, [0, 1, 2, 3], True, q, k, k_rope, v),
    )
    storages = {}

    def pack(saved):
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    with built(recipe, plan, dtype) as model, torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer = model.decoder.layers[0].self_attention
        layer(torch.randn(recipe.seq_length, batch, recipe.hidden_size, dtype=dtype, requires_grad=True), None)
        for weight in layer.parameters():
            storages.pop(weight.untyped_storage().data_ptr(), None)
    kept = sum(storage.nbytes() for storage in storages.values())
    slots = tuple(slot.model_copy(update={"kernels": {operator: "triton"}}) for slot in plan.slots)
    estimated = estimate(recipe, plan.model_copy(update={"slots": slots})).activations["attention"]
    # of a layer's two rows of the hidden size, the block's input is counted here
    assert estimated == 2 * (kept + batch * 128 * recipe.hidden_size * dtype.itemsize)


SPARSE = {"sparse_latent_attention": "triton", "indexer_kl_loss": "triton"}


@pytest.mark.parametrize("batch", [1, 2])
def test_sparse_attention_keeps_what_its_kernels_do(interpreter, batch):
    """The real layer with the real kernels, but for norms' statistics and the tables of rotations."""
    recipe = TINY.with_overrides(["seq_length=24", "pattern=A", "depth=2", "dsa.ranks=[0, 1]", "dsa.top_k=8"])
    plan = planned(recipe, "cpu", micro_batch=batch, dtype=torch.float32, kernels=SPARSE)
    storages = {}

    def pack(saved):
        if saved.shape[1:-1] != (1, 1):  # as tables have
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    with built(recipe, plan) as model, torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer = model.decoder.layers[0].self_attention
        layer(torch.randn(recipe.seq_length, batch, recipe.hidden_size, requires_grad=True), None)
        for weight in layer.parameters():
            storages.pop(weight.untyped_storage().data_ptr(), None)
    kept = sum(storage.nbytes() for storage in storages.values())
    row = 4 * batch * recipe.seq_length * recipe.hidden_size  # the block's input
    assert estimate(recipe, plan).activations["attention"] == pytest.approx(2 * (kept + row), rel=0.05)


@pytest.mark.parametrize("batch, dtype", [(1, torch.float32), (2, torch.bfloat16)])
def test_sparse_kernels_keep_and_take_for_themselves(batch, dtype):
    """What the operators keep beside their inputs and out, and what the backward that takes more does."""
    plan = planned(NAM56R, dtype=dtype, micro_batch=batch, kernels={"index_top_k": "reference"})

    def estimated(**kernels):
        slots = tuple(slot.model_copy(update={"kernels": kernels}) for slot in plan.slots)
        return estimate(NAM56R, plan.model_copy(update={"slots": slots}))

    q = torch.empty(batch, 4096, 32, 128, dtype=dtype, device="meta")
    indices = q.new_empty(batch, 4096, 256, dtype=torch.int32)
    _, _, *own = sparse._outputs(q, 64, True)
    own.append(sparse_loss._outputs(q, indices, True)[1])
    plain, ordered = estimated(), estimated(**SPARSE)
    atomic = estimated(**dict.fromkeys(SPARSE, "triton_atomic"))
    for some in (ordered, atomic):
        assert sum(some.activations.values()) - sum(plain.activations.values()) == 9 * sum(t.nbytes for t in own)
    taken = []
    for width in (128, 64):
        longest = max(chunk.stop - chunk.start for chunk in by_key.chunks(batch, 4096, 256, width * dtype.itemsize))
        rows = batch * (longest * 256 * width * dtype.itemsize + 4 * 4096 * (256 + by_key.RUNS))  # positions, counters
        taken.append(batch * 4096 * width * 4 + rows)
    assert (plain.workspace, atomic.workspace) == (0, batch * 4096 * 128 * 4)
    assert ordered.workspace == pytest.approx(max(taken), rel=0.01)
    assert ordered.total - plain.total > ordered.workspace
    indexed = estimated(index_top_k="cuda").workspace
    assert (
        indexed == estimated(index_top_k="cuda_fp8").workspace == min(8 * (6 * 256 + 512) * 4096 * batch, 320 * 2**20)
    )


@contextmanager
def built(recipe, plan, dtype=torch.float32):
    """The model of a plan on a CPU, with Megatron's groups around it."""
    from nam56r.megatron.model import build_model
    from nam56r.megatron.parallel import destroy, initialize

    forget_losses()
    initialize("cpu", seed=5)
    try:
        yield build_model(recipe, plan, device=torch.device("cpu"), dtype=dtype)
    finally:
        destroy()


def _kept(model, recipe, plan):
    family = {"A": "attention", "E": "moe", "M": "mamba", "R": "m2rnn"}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    where, storages, kept = ["head"], {}, {}

    def pack(saved):
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters and storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage  # held, so that its address isn't used again
            kept[where[0]] = kept.get(where[0], 0) + storage.nbytes()
        return saved

    parts = [(layer, family[slot.symbol]) for layer, slot in zip(model.decoder.layers, plan.slots, strict=True)]
    for part, name in (*parts, *((layer, "mtp") for layer in model.mtp.layers)):
        part.register_forward_pre_hook(lambda *_, name=name: where.__setitem__(0, name))
        part.register_forward_hook(lambda *_: where.__setitem__(0, "head"))
    tokens = torch.randint(recipe.vocab_size, (plan.micro_batch, recipe.seq_length))
    positions = torch.arange(recipe.seq_length).expand_as(tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model(tokens, positions, None, labels=tokens)
    return kept


def halves(recipe, *lengths):
    """Segments of these lengths."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert ends[-1] == recipe.depth
    return tuple(tuple(range(end - length + 1, end + 1)) for length, end in zip(lengths, ends, strict=True))


def kept(one):
    return sum(one.activations.values())


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 20), st.data())
def test_in_flight_is_megatrons_schedule(pipeline, chunks, microbatches, data):
    chunks = chunks if pipeline > 1 else 1
    rank = data.draw(st.integers(0, pipeline - 1))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=chunks, max_size=chunks))
    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: pipeline, rank=lambda: rank),
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
    )
    total, _, warm_up, _ = get_pp_rank_microbatches(microbatches, chunks, pipeline, p2p_communicator=communicator)
    table = get_schedule_table(microbatches, chunks, pipeline)
    live, most = set(), 0
    for step in range(total + warm_up):
        if step < total:
            live.add(table[step])
        most = max(most, sum(sizes[chunk] for _, chunk in live))
        if step >= warm_up:
            microbatch, chunk = table[step - warm_up]
            live.remove((microbatch, chunks - 1 - chunk))
    assert not live
    counts = in_flight(rank, pipeline, microbatches, sizes)
    assert sum(count * size for count, size in zip(counts, sizes, strict=True)) == most
    if chunks == 1:
        assert counts == (min(pipeline - rank, microbatches),)


def test_one_stage_is_the_estimate():
    plan = planned(NAM56R, micro_batch=2)
    whole = estimate(NAM56R, plan, expert_parallel=4, optimizer_shards=8)
    for segments in (halves(NAM56R, 52), halves(NAM56R, 20, 32)):  # no pipeline: segments don't matter
        options = dict(expert_parallel=4, optimizer_shards=8, microbatches=16)
        assert stages(NAM56R, plan, segments=segments, **options) == (whole,)
    assert whole.by_family.keys() == parameters(NAM56R).keys()
    held = sum(held.total for held in whole.by_family.values())
    assert whole.total == held + whole.logits + whole.workspace + whole.runtime


def test_families_have_the_recipes_parameters():
    for family, held in estimate(NAM56R, planned(NAM56R)).by_family.items():
        count = parameters(NAM56R)[family][0]
        assert (held.weights, held.gradients, held.optimizer) == (2 * count, 4 * count, 12 * count)


def test_pipeline_spreads_layers_and_keeps_an_embedding_for_mtp():
    plan = planned(NAM56R, micro_batch=4)
    whole = estimate(NAM56R, plan)
    ranks = stages(NAM56R, plan, segments=halves(NAM56R, 13, 13, 13, 13), pipeline=4)
    vocabulary = 2 * 131072 * 4096
    assert sum(rank.weights for rank in ranks) == whole.weights + vocabulary
    assert [rank.by_family["embedding"].weights for rank in ranks] == [vocabulary, 0, 0, vocabulary]
    assert [rank.by_family["head"].weights for rank in ranks] == [0, 0, 0, vocabulary]
    assert [bool(rank.by_family["mtp"].total) for rank in ranks] == [False, False, False, True]
    assert [rank.logits for rank in ranks] == [0, 0, 0, whole.logits]
    # one microbatch, so that every layer's activations are kept once
    assert sum(kept(rank) for rank in ranks) == kept(whole)
    plain = NAM56R.with_overrides(["mtp.num_depths=0"])
    ranks = stages(plain, planned(plain), segments=halves(plain, 26, 26), pipeline=2)
    assert sum(rank.weights for rank in ranks) == 2 * sum(total for total, _ in parameters(plain).values())


def test_microbatches_in_flight_multiply_activations():
    plan = planned(NAM56R)
    segments = halves(NAM56R, 13, 13, 13, 13)
    one = stages(NAM56R, plan, segments=segments, pipeline=4)
    many = stages(NAM56R, plan, segments=segments, pipeline=4, microbatches=64)
    few = stages(NAM56R, plan, segments=segments, pipeline=4, microbatches=2)
    assert [kept(rank) for rank in many] == [(4 - i) * kept(rank) for i, rank in enumerate(one)]
    assert [kept(rank) for rank in few] == [min(4 - i, 2) * kept(rank) for i, rank in enumerate(one)]
    assert [rank.weights for rank in many] == [rank.weights for rank in one]
    assert many[-1].logits == one[-1].logits
    # the published profile: PP 2, VPP 2. Rank 0 has five passes through a chunk in flight, rank 1 three
    interleaved = stages(NAM56R, plan, segments=segments, pipeline=2, microbatches=16)
    sizes = [kept(rank) for rank in one]
    assert [kept(rank) for rank in interleaved] == [3 * sizes[0] + 2 * sizes[2], 2 * sizes[1] + sizes[3]]


def test_context_parallelism_divides_tokens_and_nothing_else():
    plan = planned(NAM56R, micro_batch=2)
    one = stages(NAM56R, plan, segments=halves(NAM56R, 26, 26), pipeline=2, microbatches=4)
    two = stages(NAM56R, plan, segments=halves(NAM56R, 26, 26), pipeline=2, microbatches=4, context_parallel=2)
    for whole, half in zip(one, two, strict=True):
        assert (half.weights, half.gradients, half.optimizer) == (whole.weights, whole.gradients, whole.optimizer)
        assert all(
            half.activations[family] * 2 == pytest.approx(size, abs=99) for family, size in whole.activations.items()
        )
    assert two[1].logits < one[1].logits


def test_full_recompute_keeps_inputs_and_one_layer():
    plan = planned(NAM56R)
    tokens, row = 4096, 2 * 4096
    none = estimate(NAM56R, plan)
    (full,) = stages(NAM56R, plan, segments=halves(NAM56R, 52), recompute="full")
    counts = {"attention": 13, "moe": 22, "mamba": 13, "m2rnn": 4, "mtp": 2 * 2}
    over = {family: full.activations[family] - tokens * row * count for family, count in counts.items()}
    depth = none.activations["mtp"] // 2 - 2 * tokens * row
    assert over == {family: depth if family == "mtp" else 0 for family in counts}  # an MTP depth keeps most
    assert full.activations["head"] == none.activations["head"]
    assert (full.weights, full.logits) == (none.weights, none.logits)


def test_shared_indices_are_kept_once_and_travel_between_stages():
    """Layers 5, 21 and 37 compute them; the published layout has layer 29 in another segment than 21."""
    recipe = NAM56R.with_overrides(["dsa.share_every=3"])
    alone, shared, indices = planned(NAM56R), planned(recipe), 4096 * 256 * 4
    indexer = 2 * (32 * 65 + 2 * 64) * 4096
    assert {slot.kernels["indexer_kl_loss"] for slot in alone.slots if slot.role == "dsa"} == {"triton"}
    fewer = kept(estimate(NAM56R, alone)) - kept(estimate(recipe, shared))
    assert fewer == 6 * (indexer + indices + 4096 * 256 * 4)  # the loss's slopes
    (plain,) = stages(NAM56R, alone, segments=halves(NAM56R, 52), recompute="full")
    (full,) = stages(recipe, shared, segments=halves(recipe, 52), recompute="full")
    assert kept(full) - kept(plain) == 3 * indices
    four = {"segments": halves(recipe, 13, 13, 13, 13), "pipeline": 4, "recompute": "full"}
    own, received = stages(NAM56R, alone, **four), stages(recipe, shared, **four)
    # 5 in the first; 21 in the second, and what it received, which nobody uses; those of 21 in the third, once more apart, and 37
    assert [(kept(b) - kept(a)) // indices for a, b in zip(own, received, strict=True)] == [1, 2, 3, 2]
    apart = halves(recipe, 20, 16, 16)
    own, received = (
        stages(r, p, segments=apart, pipeline=3, recompute="full") for r, p in ((NAM56R, alone), (recipe, shared))
    )
    assert [(kept(b) - kept(a)) // indices for a, b in zip(own, received, strict=True)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline": 0}, "pipeline is 0, but must be a whole number from 1"),
        ({"microbatches": 0}, "microbatches is 0, but must be a whole number from 1"),
        ({"recompute": "half"}, "recompute is 'half', but must be one of none, full"),
        ({"pipeline": 2}, "pipeline is 2, but must divide the number of segments, which is 1"),
        ({"segments": ((1, 2, 3),)}, "segments is .* but must have each layer from 1 to 12 once, in order"),
        ({"segments": (range(2, 13), (1,))}, "segments is .* but must have each layer from 1 to 12 once, in order"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stages(TINY, planned(TINY, "cpu"), **({"segments": halves(TINY, 12)} | options))


@pytest.mark.parametrize("depths", [0, 1])
def test_each_ranks_weights_are_those_of_megatrons_model(monkeypatch, depths):
    """The real model of either of two pipeline ranks, in a process group that only pretends."""
    from nam56r.megatron.cpu import cpu_mode
    from nam56r.megatron.model import build_model
    from nam56r.megatron.parallel import destroy

    recipe = TINY.with_overrides(["pattern=AEMEA|EMEAEMR", f"mtp.num_depths={depths}"])
    plan = planned(recipe, "cpu", dtype=torch.float32)
    estimated = stages(recipe, plan, segments=halves(recipe, 5, 7), pipeline=2)
    cpu_mode()
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)  # Megatron's copy of the embedding asks for it
    for rank in range(2):
        torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2, create_gloo_process_groups=False)
            model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
            model = build_model(recipe, plan, device=torch.device("cpu"), dtype=torch.float32)
        finally:
            destroy()
        assert estimated[rank].weights == sum(parameter.numel() * 4 for parameter in model.parameters())
