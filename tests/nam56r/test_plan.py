"""The plan: complete or refused with everything at once, and asking kernels what the operators will ask them."""

import importlib
import inspect
import json

import pytest
import torch

from nam56r import flops
from nam56r.kernels import registry
from nam56r.kernels.registry import DEVICES, FAMILY, Device, Kernel, Problem, Spec, candidates, select
from nam56r.plan import Plan, PlanRefused, make_plan
from nam56r.problems import ATTENTION, Workload, forms
from nam56r.recipe import PRESETS, Recipe
from nam56r.translate import translate

TINY, NAM56R, H200, A100 = PRESETS["nam56r-tiny"], PRESETS["nam56r"], DEVICES["h200"], DEVICES["a100"]
DENSE = NAM56R.with_overrides(["pattern=A", "depth=1", "dsa.ranks=[]", "mtp.num_depths=1"])
DEEPSEEK = DENSE.with_overrides(
    [
        "mla.num_heads=128",
        "mla.q_lora_rank=1536",
        "mla.kv_lora_rank=512",
        "mla.qk_nope_head_dim=128",
        "mla.v_head_dim=128",
    ]
)
AROUND = {"rms_norm", "mla_queries", "mla_latents"}
OPERATORS = {
    "mla": {*AROUND, "latent_attention"},
    "dsa": {"rms_norm", "index_top_k", "sparse_latent_attention", "indexer_kl_loss"},
    "moe": {"rms_norm", "moe_experts"},
    "mamba3": {"rms_norm", "mamba3_scan"},
    "mamba2": {"rms_norm", "causal_conv1d", "mamba2_scan"},
    "m2rnn": {"rms_norm", "causal_conv1d", "m2rnn"},
    "mtp": {*AROUND, "latent_attention", "linear_cross_entropy"},
    "head": {"rms_norm", "linear_cross_entropy"},
}


def refused(*arguments, **options):
    with pytest.raises(PlanRefused) as caught:
        make_plan(*arguments, **options)
    assert not caught.value.plan.accepted
    assert caught.value.refusals == caught.value.plan.refusals
    return caught.value


def test_tiny_is_accepted_on_a_cpu():
    plan = make_plan(TINY, DEVICES["cpu"], dtype=torch.float32)
    assert plan.accepted and plan.refusals == ()
    assert plan.counts == {"A": 3, "E": 5, "M": 3, "R": 1}
    assert [slot.layer for slot in plan.slots] == list(range(1, 13))
    for slot in plan.slots:
        assert set(slot.kernels) == set(slot.shapes) == OPERATORS[slot.role]
        assert slot.seams == ((slot.symbol,) if slot.symbol in "MR" else ())
    assert len(plan.mtp) == 1 and set(plan.mtp[0].kernels) == OPERATORS["mtp"]
    assert set(plan.head.kernels) == OPERATORS["head"]
    assert plan.slots[4].features == ("mla", "dsa") and plan.features == ("mtp",)
    assert plan.notes == translate(TINY).custom_notes


def test_the_production_recipe_is_accepted_on_an_h200():
    plan = make_plan(NAM56R, H200)
    assert plan.accepted and plan.refusals == ()
    parts = [(slot.role, slot) for slot in plan.slots]
    parts += [("head", plan.head), *(("mtp", part) for part in plan.mtp)]
    for role, part in parts:
        assert part.kernels.keys() == OPERATORS[role] and "reference" not in part.kernels.values()


def test_slots_that_only_references_can_run_are_refused_on_a_gpu():
    """On an A100, for which some operators have no fast kernel, and others have."""
    plan = refused(NAM56R, A100).plan
    by_role = {}
    for slot in plan.slots:
        by_role.setdefault(slot.role, set()).add(slot.layer)
    assert {role: len(layers) for role, layers in by_role.items()} == {
        "mla": 4, "dsa": 9, "moe": 22, "mamba3": 13, "m2rnn": 4,
    }  # fmt: skip
    reasons = {(r.layer, r.operator): " ".join(r.reasons) for r in plan.refusals}
    for slot in plan.slots:
        for operator in OPERATORS[slot.role]:
            if operator in slot.kernels:
                assert slot.kernels[operator] != "reference"
            else:
                assert f"{operator}=reference" in reasons[slot.layer, operator]
                assert "development kernel" in reasons[slot.layer, operator]
    for layer in by_role["dsa"]:
        assert {operator for where, operator in reasons if where == layer} == {"index_top_k"}
        assert "a100 is sm_80, but the CUDA kernel takes sm_90" in reasons[layer, "index_top_k"]
    assert not {layer for layer, _ in reasons} & (by_role["mla"] | {"head", "mtp 1", "mtp 2"})


def test_references_run_on_a_gpu_when_asked_for_by_name():
    operators = "index_top_k sparse_latent_attention indexer_kl_loss mamba3_scan causal_conv1d m2rnn".split()
    plan = make_plan(NAM56R, H200, kernels=dict.fromkeys(operators, "reference"))
    assert plan.accepted
    assert plan.slots[11].kernels["m2rnn"] == "reference"
    assert plan.slots[11].reasons["m2rnn"] == "asked for by name"
    assert all(set(part.reasons) == set(part.kernels) for part in (*plan.slots, *plan.mtp, plan.head))
    assert plan.slots[0].kernels.keys() == OPERATORS["mla"] and "reference" not in plan.slots[0].kernels.values()


def test_all_refusals_come_at_once_and_say_why(monkeypatch):
    def never(problem):
        return (f"no kernel for {problem['x'].shape}",)

    support = importlib.import_module("nam56r.kernels.norm.support")
    monkeypatch.setattr(support, "KERNELS", (Kernel("rms_norm", "torch", print, never),))
    registry.select.cache_clear()
    error = refused(TINY.with_overrides(["features.engram=[2]"]), DEVICES["cpu"], dtype=torch.float32)
    registry.select.cache_clear()
    where = [refusal.layer for refusal in error.refusals]
    assert where == ["model", 2, *range(1, 13), "mtp 1", "head"]
    assert error.refusals[-1].reasons == ("torch: no kernel for (1, 256, 256)",)
    assert "engram at model" in str(error) and "rms_norm at 1, 2, 3" in str(error)
    assert all("rms_norm" not in slot.kernels and slot.shapes["rms_norm"] for slot in error.plan.slots)


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ({"m2rn": "reference"}, "unknown operator 'm2rn': one of .*m2rnn"),
        ({"m2rnn": "refrence"}, "m2rnn has no kernel 'refrence': one of .*reference"),
    ],
)
def test_names_what_exists(kernels, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_plan(TINY, DEVICES["cpu"], kernels=kernels)
    assert not isinstance(caught.value, PlanRefused)


@pytest.mark.parametrize(
    "bad", [{"micro_batch": 0}, {"tensor_parallel": -1}, {"micro_batch": 1.5}, {"micro_batch": True}]
)
def test_refuses_sizes(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*whole number from 1"):
        make_plan(TINY, DEVICES["cpu"], **bad)


def test_tensor_parallelism_splits_and_says_what_does_not_divide():
    plan = make_plan(TINY, DEVICES["cpu"], tensor_parallel=2, micro_batch=3, dtype=torch.float32)
    assert plan.slots[0].shapes["latent_attention"]["q"] == (3, 256, 2, 64)
    assert plan.slots[0].shapes["mla_queries"]["up"] == (2, 32, 32)
    assert plan.slots[0].shapes["mla_latents"]["kv"] == (1, 256 * 3 // 2, 64)
    assert plan.slots[2].shapes["mamba3_scan"]["B"] == (3, 256, 2, 1, 32)
    assert plan.slots[4].shapes["index_top_k"]["q"] == (3, 256, 4, 32)
    assert plan.slots[11].shapes["m2rnn"]["v"] == (3, 256, 3, 16)
    assert plan.head.kernels["linear_cross_entropy"] == plan.mtp[0].kernels["linear_cross_entropy"] == "megatron"
    assert any("vocabulary" in note for note in plan.notes) and any("replicated" in note for note in plan.notes)

    error = refused(TINY, DEVICES["cpu"], tensor_parallel=3, dtype=torch.float32)
    reasons = {(r.layer, r.operator): " ".join(r.reasons) for r in error.refusals}
    assert "mla.num_heads = 4 doesn't divide by tensor_parallel = 3" in reasons[1, "latent_attention"]
    assert "mamba.ngroups = 2" in reasons[3, "mamba3_scan"]
    assert "vocab_size = 512" in reasons["head", "linear_cross_entropy"]
    assert not any(layer == 12 for layer, _ in reasons)


def test_json_is_the_plan(tmp_path):
    plan = refused(NAM56R, A100, micro_batch=2).plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    shown = json.loads(json.dumps(plan.to_json()))
    assert shown == json.loads((tmp_path / "plan.json").read_text())
    assert (shown["recipe"], shown["device"], shown["accepted"]) == ("nam56r", "a100", False)
    assert shown["counts"] == {"A": 13, "E": 22, "M": 13, "R": 4}
    assert len(shown["slots"]) == 52
    assert set(shown["refusals"][0]) == {"layer", "operator", "reasons"}
    assert {"layer", "symbol", "role", "kernels", "seams", "flops_per_token"} <= set(shown["slots"][0])
    (tmp_path / "plan.json").write_text('{"recipe": 1}')
    with pytest.raises(ValueError, match="is no plan: recipe: "):
        Plan.load(tmp_path / "plan.json")


def test_flops_of_the_parts_are_the_models():
    plan = make_plan(TINY, DEVICES["cpu"], dtype=torch.float32)
    for way in ("forward", "backward"):
        parts = [part.flops_per_token[way] for part in (*plan.slots, *plan.mtp, plan.head)]
        assert sum(parts) == pytest.approx(plan.flops_per_token[way]) == getattr(flops.model(TINY), way)


def test_index_sharing_and_no_loss_leave_operators_out():
    recipe = Recipe.load("nam56r-tiny").with_overrides(
        ["pattern=A", "depth=4", "dsa.ranks=[0,1,2]", "dsa.share_every=2"]
    )
    plan = make_plan(recipe, DEVICES["cpu"], dtype=torch.float32)
    for operator in ("index_top_k", "indexer_kl_loss"):
        assert [operator in slot.kernels for slot in plan.slots] == [True, False, True, False]
    assert ["sparse_latent_attention" in slot.kernels for slot in plan.slots] == [True, True, True, False]
    assert "dsa: layers 1, 3 compute indices, and the sparse layers between use them: 1 for 2" in plan.notes
    assert [slot.role for slot in plan.slots] == ["dsa", "dsa", "dsa", "mla"]
    alone = recipe.with_overrides(["dsa.share_every=1", "dsa.loss_coeff=0"])
    still = make_plan(alone, DEVICES["cpu"], dtype=torch.float32)
    assert "indexer_kl_loss" not in still.slots[0].kernels and "index_top_k" in still.slots[0].kernels
    assert not [note for note in still.notes if "indices" in note]


def test_mamba2_is_planned_beside_every_other_block():
    recipe = TINY.with_overrides(["mamba.kind=mamba2"])
    plan = make_plan(recipe, DEVICES["cpu"], tensor_parallel=2, dtype=torch.float32)
    assert plan.accepted and plan.native_pattern == make_plan(TINY, DEVICES["cpu"]).native_pattern
    for slot in plan.slots:
        assert set(slot.kernels) == OPERATORS[slot.role]
        assert slot.seams == ((slot.symbol,) if slot.symbol == "R" else ())
    shapes = plan.slots[2].shapes["mamba2_scan"]
    assert plan.slots[2].features == ("mamba2",)
    assert (shapes["x"], shapes["B"], shapes["dt"]) == ((1, 256, 4, 64), (1, 256, 1, 32), (1, 256, 4))
    error = refused(recipe, DEVICES["cpu"], tensor_parallel=16, dtype=torch.float32)
    reasons = {(r.layer, r.operator): " ".join(r.reasons) for r in error.refusals}
    assert "the number of Mamba heads = 8" in reasons[3, "mamba2_scan"]
    assert "mamba.ngroups = 2" in reasons[3, "mamba2_scan"]


def tensor(spec, name):
    if name == "indices":
        return torch.full(spec.shape, -1, dtype=spec.dtype)
    if not spec.dtype.is_floating_point:
        return torch.zeros(spec.shape, dtype=spec.dtype)
    return torch.rand(spec.shape, dtype=spec.dtype)


@pytest.mark.parametrize(
    "settings", [(), ("mamba.mimo_rank=1",), ("mamba.kind=mamba2",)], ids=["mimo", "siso", "mamba2"]
)
def test_problems_are_those_that_the_operators_pose(settings, monkeypatch):
    """Each public operator, called with tensors of the planned shapes, must ask the registry what the plan asked."""
    small = "depth=12 hidden_size=64 seq_length=8 vocab_size=16 dsa.top_k=4 m2rnn.k_head_dim=8 mamba.d_state=8".split()
    recipe = TINY.with_overrides([*small, "moe.ffn_hidden_size=8", *settings])
    posed = []
    make = Problem.of.__func__

    def of(cls, operator, /, device=None, **arguments):
        posed.append(make(cls, operator, device, **arguments))
        return posed[-1]

    monkeypatch.setattr(Problem, "of", classmethod(of))
    asked = [
        (operator, arguments)
        for batch, form in ((1, "absorbed"), (2, "absorbed"), (2, "expanded"))
        for role in {*recipe.roles, "mtp", "head"}
        for operator, arguments in Workload(recipe, batch, 1, torch.float32).operators(role, form=form).items()
    ]
    for operator, arguments in asked:
        run = getattr(importlib.import_module(f"nam56r.kernels.{FAMILY[operator]}"), operator)
        values = {n: tensor(v, n) if isinstance(v, Spec) else v for n, v in arguments.items()}
        if values.get("psi") is not None:
            values["mimo"] = (values["psi"], values["zeta"], values["phi"])
        values |= {"eps": 1e-5, "scale": 0.1, "sin": values.get("cos")}
        posed.clear()
        run(**{name: values[name] for name in inspect.signature(run).parameters if name in values})
        planned = make(Problem, operator, Device.of("cpu"), **arguments)
        assert dict(posed[0].arguments) == dict(planned.arguments), operator
    assert {operator for operator, _ in asked} >= {*ATTENTION.values(), "mla_queries", "mla_latents", "moe_experts"}


@pytest.mark.parametrize("recipe", [DENSE, DEEPSEEK], ids=["nam56r", "deepseek"])
@pytest.mark.parametrize("device", ["h200", "a100", "cpu"])
def test_dense_attention_takes_the_form_of_fewer_flops(recipe, device):
    """384 FLOPs a score in either form, of which the absorbed one stores no K and V; 2176 against 640."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    plan = make_plan(recipe, DEVICES[device], dtype=dtype, micro_batch=2)
    form, numbers = ("absorbed", ("384", "384")) if recipe is DENSE else ("expanded", ("640", "2176"))
    work = Workload(recipe, 2, 1, dtype)
    for part in (*plan.slots, *plan.mtp):
        asked = work.operators("mla", form=form)
        assert [op for op in ATTENTION.values() if op in part.kernels] == [ATTENTION[form]]
        for operator, arguments in asked.items():
            wanted = select(Problem.of(operator, DEVICES[device], **arguments)).name
            assert part.kernels[operator] == wanted, operator
        why = part.reasons[ATTENTION[form]]
        stored = (
            2 * 4096 * recipe.mla.num_heads * (recipe.mla.qk_nope_head_dim + recipe.mla.v_head_dim) * dtype.itemsize
        )
        assert why.startswith(f"{form}: {numbers[0]} FLOPs") and numbers[1] in why
        assert f"{stored / 2**20:.1f} MiB" in why and ("first choice" in why or f"{device}" in why)


@pytest.mark.parametrize("form", ATTENTION)
def test_a_kernel_by_name_takes_its_form(form):
    operator = ATTENTION[form]
    for recipe in (DENSE, DEEPSEEK):
        part = make_plan(recipe, H200, kernels={operator: "reference"}).slots[0]
        assert part.kernels[operator] == "reference" and part.kernels.keys().isdisjoint(
            {*ATTENTION.values()} - {operator}
        )
        assert part.reasons[operator] == f"{form}, as named; asked for by name"
        assert (part.shapes["mla_queries"].get("up") is None) == (form == "expanded")


def test_kernels_of_both_forms_by_name_are_one_refusal():
    error = refused(DENSE, H200, kernels={"mla_attention": "torch", "latent_attention": "reference"})
    lines = str(error).splitlines()
    assert lines[1:] == [
        "  latent_attention at 1, mtp 1: latent_attention=reference and mla_attention=torch are asked for by name, "
        "but a layer has one form: name one"
    ]


def only(monkeypatch, *operators):
    """Kernels of the family that take anything, whatever their role, for these operators; none for the others."""
    support = importlib.import_module("nam56r.kernels.mla.support")
    kept = tuple(
        Kernel(
            k.operator, k.name, k.run, (lambda problem: ()) if k.operator in operators else (lambda problem: ("no",))
        )
        for k in support.KERNELS
    )
    monkeypatch.setattr(support, "KERNELS", kept)
    registry.select.cache_clear()


@pytest.fixture
def fresh():
    yield
    registry.select.cache_clear()


@pytest.mark.parametrize(("recipe", "other"), [(DENSE, "expanded"), (DEEPSEEK, "absorbed")], ids=["nam56r", "deepseek"])
def test_the_other_form_is_taken_where_the_better_one_has_no_kernel(recipe, other, monkeypatch, fresh):
    better = forms(recipe.mla)[0]
    assert better != other
    only(monkeypatch, ATTENTION[other], "mla_queries", "mla_latents")
    part = make_plan(recipe, H200).slots[0]
    assert ATTENTION[other] in part.kernels and ATTENTION[better] not in part.kernels
    assert part.reasons[ATTENTION[other]].startswith(f"{other}: ")
    assert f"{better} has no kernel ({ATTENTION[better]} " in part.reasons[ATTENTION[other]]


def test_both_forms_refusals_are_listed(monkeypatch, fresh):
    only(monkeypatch, "mla_queries", "mla_latents")
    reasons = {(r.layer, r.operator): r.reasons for r in refused(DENSE, H200).refusals}
    assert reasons.keys() == {(1, "latent_attention"), ("mtp 1", "latent_attention")}
    listed = reasons[1, "latent_attention"]
    own = [kernel.name for kernel in candidates("latent_attention")]
    assert list(listed[:-1]) == [f"{name}: no" for name in own]
    others = "; ".join(f"mla_attention {kernel.name}: no" for kernel in candidates("mla_attention"))
    assert listed[-1] == f"expanded: {others}"


def test_what_one_form_lacks_around_its_attention_counts():
    """On a GPU the absorbing kernel takes multiples of 16; the queries' rotation alone any size."""
    odd = DENSE.with_overrides(["mla.qk_nope_head_dim=40", "mla.kv_lora_rank=40"])
    part = make_plan(odd, H200).slots[0]
    assert "mla_attention" in part.kernels and "Dn = 40" in part.reasons["mla_attention"]


def test_a_rotation_that_does_not_turn_is_refused():
    error = refused(TINY.with_overrides(["mla.rope_theta=1"]), DEVICES["cpu"], dtype=torch.float32)
    assert {(r.layer, r.operator) for r in error.refusals} == {(1, "mla_queries"), ("mtp 1", "mla_queries")} | {
        (slot.layer, "mla_queries") for slot in error.plan.slots if slot.role == "mla"
    }
    assert "mla.rope_theta is 1" in str(error) and "above 1" in str(error)
