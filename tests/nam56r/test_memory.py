"""The memory estimate, against what a model keeps for its backward and against the published pains."""

import pytest
import torch

from nam56r.kernels.registry import DEVICES
from nam56r.memory import GIB, Estimate, available, check, estimate
from nam56r.parameters import parameters
from nam56r.plan import PlanRefused, make_plan
from nam56r.recipe import PRESETS

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
    assert ep.optimizer == ep.weights * 6 // 8
    assert tp.activations["m2rnn"] == one.activations["m2rnn"]
    assert tp.activations["mamba"] < one.activations["mamba"]
    whole = 2 * (routed + parameters(NAM56R)["m2rnn"][0] + parameters(NAM56R)["norm"][0])
    assert tp.weights - whole == (one.weights - whole) // 2


def test_batch_and_sequence_and_kernels_count():
    base = estimate(TINY, planned(TINY, "cpu"))
    more = estimate(TINY, planned(TINY, "cpu", micro_batch=4))
    assert all(more.activations[family] == pytest.approx(4 * size, abs=4) for family, size in base.activations.items())
    longer = TINY.with_overrides(["seq_length=512"])
    assert estimate(longer, planned(longer, "cpu")).activations["moe"] == 2 * base.activations["moe"]
    stored = estimate(TINY, planned(TINY, "cpu", kernels={"linear_cross_entropy": "reference"}))
    assert stored.logits > base.logits
    scores = estimate(NAM56R, planned(NAM56R, kernels={"mla_attention": "reference"}))
    fast = estimate(NAM56R, planned(NAM56R))
    assert scores.activations["attention"] - fast.activations["attention"] > 4 * 4 * 32 * 4096**2  # fp32, 4 dense slots


def test_chunked_loss_saves_the_published_logits():
    """Stored, the head's logits of 8 sequences are 8 · 4096 · 131072 numbers: 16 GiB in fp32."""
    chunked = estimate(NAM56R, planned(NAM56R, micro_batch=8))
    stored = estimate(NAM56R, planned(NAM56R, micro_batch=8, kernels={"linear_cross_entropy": "reference"}))
    assert stored.logits >= 3 * 16 * GIB
    assert chunked.logits < 1 * GIB


def test_refuses_what_does_not_fit():
    cpu = DEVICES["cpu"]
    small = Estimate(1, 2, 3, {"moe": 4}, 5, runtime=6)
    assert small.total == 21
    check(small, cpu, 21)
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


def test_activations_are_what_the_model_keeps():
    """Bytes that autograd saves in a forward of the real model, by layer, within a third of the estimate."""
    from nam56r.megatron.model import build_model
    from nam56r.megatron.parallel import destroy, initialize

    recipe = TINY.with_overrides(["seq_length=128"])
    plan = planned(recipe, "cpu", micro_batch=2, dtype=torch.float32)
    initialize("cpu", seed=5)
    try:
        model = build_model(recipe, plan, device=torch.device("cpu"), dtype=torch.float32)
        kept = _kept(model, recipe, plan)
    finally:
        destroy()
    estimated = estimate(recipe, plan)
    assert estimated.weights == sum(parameter.numel() * 4 for parameter in model.parameters())
    for family in ("attention", "moe", "mamba", "m2rnn", "mtp"):
        assert estimated.activations[family] == pytest.approx(kept[family], rel=1 / 3), family
    assert sum(estimated.activations.values()) == pytest.approx(sum(kept.values()), rel=0.2)


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
