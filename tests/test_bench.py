"""What the bench records, checked without a GPU: a timer that is told what to say stands in for the clock."""

import json
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

import bench.measure
import bench.peers
import bench.peers.cudnn
import bench.peers.mamba_ssm
import bench.peers.xma
from bench import record as recording
from bench import test_m2rnn as bench_m2rnn
from bench import test_mamba2 as bench_mamba2
from bench import test_mamba3 as bench_mamba3
from bench import test_mla as bench_mla
from bench.measure import Measured
from nam56r.kernels.m2rnn import m2rnn
from nam56r.kernels.mamba2 import mamba2_scan
from nam56r.kernels.mamba3 import mamba3_scan
from nam56r.kernels.mamba3.state import Mamba3State
from nam56r.kernels.registry import DEVICES, NoKernel, Problem, Spec
from nam56r.kernels.testing import outputs_and_gradients

FIELDS = (
    "op case kernel pass ms tflops gbs peak_mib first_call_s peer peer_ms ratio floor_ms commit torch triton device date"
).split()


def made(case="B2 S8", kernel="torch", passed="fwd", **values):
    return recording.record("rms_norm", case, kernel, passed, **{"ms": 2.0, "device": "h200", **values})


def test_a_record_has_the_fields_of_the_design():
    record = made(flops=4e9, moved=6e6, peer="peer:other", peer_ms=3.0)
    assert list(record) == FIELDS
    assert (record["tflops"], record["gbs"], record["ratio"]) == (2.0, 3.0, 1.5)
    plain = made()
    assert plain["tflops"] is plain["gbs"] is plain["peer"] is plain["ratio"] is plain["floor_ms"] is None
    with pytest.raises(ValueError, match="pass is 'bwd'"):
        made(passed="bwd")


def test_merging_replaces_by_op_case_kernel_and_pass(tmp_path):
    path = recording.path_of(tmp_path / "new", "H200")
    assert path.name == "h200.json"
    recording.merge(path, [made(), made(case="B1 S1"), made(passed="fwd+bwd")])
    recording.merge(path, [made(ms=1.0), made(kernel="peer:other")])
    held = json.loads(path.read_text())
    assert [(r["case"], r["kernel"], r["pass"], r["ms"]) for r in held] == [
        ("B1 S1", "torch", "fwd", 2.0),
        ("B2 S8", "peer:other", "fwd", 2.0),
        ("B2 S8", "torch", "fwd", 1.0),
        ("B2 S8", "torch", "fwd+bwd", 2.0),
    ]
    assert [p.name for p in path.parent.iterdir()] == ["h200.json"]


def test_a_stopped_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "h200.json"
    recording.merge(path, [made()])
    before = path.read_text()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recording.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        recording.merge(path, [made(ms=1.0)])
    assert path.read_text() == before


def test_the_commit_comes_from_git_or_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("NAM56R_COMMIT", raising=False)
    assert recording.commit() == "unknown"
    monkeypatch.setenv("NAM56R_COMMIT", "abc1234")
    assert recording.commit() == "abc1234"

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        recording.subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "h200.json").write_text("[]")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    clean = recording.commit()
    assert clean and clean != "abc1234" and "dirty" not in clean
    (tmp_path / "bench" / "results" / "h200.json").write_text("[1]")
    assert recording.commit() == clean
    (tmp_path / "file").write_text("2")
    assert recording.commit() == f"{clean}-dirty"


def test_a_case_is_measured_beside_its_peers():
    x = torch.randn(3, requires_grad=True)
    ran = []

    def run(kernel):
        if kernel == "peer:absent":
            raise NoKernel(Problem.of("rms_norm", x=x), {kernel: ("absent is not installed",)})
        ran.append((kernel, torch.is_grad_enabled()))
        return x * 2, torch.tensor([1])

    def timer(call):
        result = call()
        assert (result[0].requires_grad, len(result)) in [(False, 2), (False, 1)]
        return Measured(
            ms={"torch": 4.0, "peer:slow": 8.0, "peer:fast": 2.0}[ran[-1][0]], peak_mib=1.0, first_call_s=0.5
        )

    records, skipped = bench.measure.case(
        "rms_norm",
        "B3",
        "torch",
        run,
        grad=[x],
        flops={"fwd": 4e9, "fwd+bwd": 8e9},
        moved={"fwd": 4e6},
        floor_ms={"fwd": 1.0},
        peers=("peer:slow", "peer:absent", "peer:fast"),
        timer=timer,
        device="h200",
    )
    assert skipped == {"peer:absent": "absent is not installed"}
    assert ran == [(k, g) for k in ("torch", "peer:slow", "peer:fast") for g in (False, True)]
    ours = {r["pass"]: r for r in records if r["kernel"] == "torch"}
    assert set(ours) == {"fwd", "fwd+bwd"} and len(records) == 6
    assert (ours["fwd"]["peer"], ours["fwd"]["peer_ms"], ours["fwd"]["ratio"]) == ("peer:fast", 2.0, 0.5)
    assert (ours["fwd"]["tflops"], ours["fwd+bwd"]["tflops"], ours["fwd"]["gbs"]) == (1.0, 2.0, 1.0)
    assert (ours["fwd"]["floor_ms"], ours["fwd+bwd"]["floor_ms"]) == (1.0, None)
    assert all(r["peer"] is None for r in records if r["kernel"] != "torch")
    assert recording.table(records)[0].split()[:4] == ["op", "case", "kernel", "pass"]


def test_our_own_refusal_is_no_skip():
    def run(kernel):
        raise NoKernel(Problem.of("rms_norm", x=torch.zeros(1)), {"torch": ("why",)})

    with pytest.raises(NoKernel, match="why"):
        bench.measure.case("rms_norm", "B3", "torch", run, timer=lambda call: call(), device="h200")


def test_peers_are_registered_as_peers():
    problem = Problem.of("rms_norm", x=torch.zeros(1))
    refuses = bench.peers.not_installed("no_such_project")
    assert refuses(problem) == ("needs a CUDA device", "no_such_project is not installed")
    for kernel in bench.peers.register_all():
        assert kernel.role == "peer" and kernel.name.startswith("peer:")


def test_the_floor_is_the_larger_of_arithmetic_and_memory():
    floors = bench.measure.floors("h200", {"fwd": 989e9, "fwd+bwd": 989e9}, {"fwd": 48e8, "fwd+bwd": 48e9})
    assert floors == pytest.approx({"fwd": 1.0, "fwd+bwd": 10.0})
    assert bench.measure.floors("h200", {}, {"fwd": 48e8}) == pytest.approx({"fwd": 1.0})
    assert bench.measure.floors("a chip nobody knows", {"fwd": 1.0}, {}) == {}


def test_the_table_has_a_recurrence_s_time_by_the_step():
    scan = recording.record("m2rnn", "B2 S4096 N51 K64 V16", "cuda", "fwd", ms=0.4096, device="h200")
    heads, *rows = (line.split("  ") for line in recording.table([scan, made()]))
    column = [head for head in heads if head].index("us/step")
    cells = [[cell.strip() for cell in row if cell][column] for row in rows]
    assert cells == ["0.1", "-"]


def test_errors_are_against_the_reference_in_float64_on_the_same_values():
    inputs = bench_m2rnn.Case(2, 70, 3, K=8, V=4, gates=torch.float32).inputs("cpu")
    dy = torch.randn_like(inputs["v"])
    seen = []

    def run(kernel, **arguments):
        seen.append((kernel, arguments["v"].dtype, arguments["weight"].dtype))
        y = m2rnn(**arguments, kernel="reference")[0]
        return y * 1.5 if kernel == "off by half" else y

    found = bench.measure.errors(run, inputs, dy, ("plain", "off by half"))
    assert seen == [
        ("reference", torch.float64, torch.float64),
        ("plain", torch.bfloat16, torch.float32),
        ("off by half", torch.bfloat16, torch.float32),
    ]
    assert list(found) == ["y", "dq", "dk", "dv", "dweight", "dforget"]
    for name, pair in found.items():
        assert list(pair) == ["plain", "off by half"]
        assert 0 < pair["plain"] < 0.01, name
        assert pair["off by half"] == pytest.approx(0.5, rel=0.02), name


def test_errors_are_kept_beside_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "commit", lambda: "abc1234")
    first = {"y": {"cuda": 0.1, "peer:xma": 0.2}, "dq": {"cuda": 0.3, "peer:xma": 0.4}}
    path = recording.keep_errors(tmp_path / "new", "m2rnn", "B2 S8", "h200", first)
    assert path == tmp_path / "new" / "h200-m2rnn-error.json"
    recording.keep_errors(tmp_path / "new", "m2rnn", "B2 S9", "h200", {"y": {"cuda": 0.123456789, "peer:xma": 2.0}})
    held = json.loads(path.read_text())
    assert list(held) == ["case", "commit", "date", "device", "errors"]
    assert (held["case"], held["commit"], held["device"]) == ("B2 S9", "abc1234", "h200")
    assert held["errors"] == {"y": {"cuda": 0.12346, "peer:xma": 2.0}}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_m2rnn_s_cases():
    cases = bench_m2rnn.CASES
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert names[0] == "B2 S4096 N51 K64 V16" and "B4 S4096 N44 K64 V16" in names
    beside = [case for case in cases if case.peers]
    assert {case.S for case in beside if case.N == 51} == {2**n for n in range(10, 16)}
    assert {case.N for case in beside} == {51, 44, *(2**n for n in range(8))}
    assert {(case.K, case.V) for case in beside} == {(64, 16)}, "XMA tunes for every (K, V)"
    retuned = [case.N == 1 or case.sequences > 1 for case in beside]
    assert retuned == sorted(retuned), "what XMA tunes again for comes last"
    for word in ("fp16", "fp32", "fp32forget", "packed8", "V32", "V64", "K16", "K128"):
        assert any(word in name.split() for name in names), word


def test_m2rnn_s_inputs_are_the_layer_s():
    case = bench_m2rnn.Case(1, 512, 51, sequences=8)
    inputs = case.inputs("cpu")
    assert {t.dtype for name, t in inputs.items() if name != "cu_seqlens"} == {torch.bfloat16}
    assert inputs["cu_seqlens"].tolist() == list(range(0, 513, 64))
    assert inputs["q"].shape == inputs["k"].shape == (1, 512, 1, 64)
    forget = inputs["forget"].float()
    assert 0 < forget.min() and forget.max() <= 1 and 0.3 < forget.mean() < 0.98
    y, final = m2rnn(**inputs)
    assert y.isfinite().all() and final.abs().max() < 1 and y.std() > 0.1
    gates = bench_m2rnn.Case(1, 8, 2, gates=torch.float32).inputs("cpu")
    assert gates["weight"].dtype == gates["forget"].dtype == torch.float32 and gates["v"].dtype == torch.bfloat16


def test_m2rnn_s_floor_is_a_latency_by_the_step():
    floor = bench_m2rnn.RECIPE.floor_ms("h200")
    assert floor == pytest.approx({"fwd": 0.33, "fwd+bwd": 0.8}, rel=0.01)
    twice = bench_m2rnn.Case(2, 8192, 8).floor_ms("h200")
    assert twice == pytest.approx({passed: 2 * ms for passed, ms in floor.items()})
    assert bench_m2rnn.Case(1, 8192, 51, sequences=2).floor_ms("h200") == pytest.approx(floor)
    assert not bench_m2rnn.RECIPE.floor_ms("a100")
    assert not bench_m2rnn.Case(2, 4096, 51, dtype=torch.float32).floor_ms("h200")


def standing_in_for_xma(query, key, value, weight, forget_input, input_state=None, *, cu_seqlens=None, max_seqlen=None):
    """XMA's signature, layouts and wish for one dtype, computed by the reference."""
    assert {t.dtype for t in (query, key, value, weight, forget_input)} == {query.dtype}
    assert input_state is None or input_state.dtype == query.dtype
    assert (cu_seqlens is None) == (max_seqlen is None)
    tokens = [query, key, value, forget_input]
    assert [t.dim() for t in tokens] == ([4, 4, 4, 3] if cu_seqlens is None else [3, 3, 3, 2])
    q, k, v, forget = tokens if cu_seqlens is None else [t[None] for t in tokens]
    y, final = m2rnn(q, k, v, weight, forget, input_state, cu_seqlens, kernel="reference")
    return y if cu_seqlens is None else y[0], final.to(query.dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_xma_is_given_what_it_wants(monkeypatch, packed):
    for name in ("xma", "xma.layers", "xma.layers.m2rnn"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["xma.layers.m2rnn"].m2rnn = standing_in_for_xma
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    rows = 3 if packed else 2
    inputs = bench_m2rnn.Case(1 if packed else 2, 12, 4, K=8, V=4, gates=torch.float32).inputs("cpu")
    inputs["initial_state"] = torch.randn(rows, 4, 8, 4, requires_grad=True)
    inputs["cu_seqlens"] = torch.tensor([0, 5, 5, 12], dtype=torch.int32) if packed else None
    (y, final), gradients = outputs_and_gradients(bench.peers.xma.m2rnn, inputs, None)
    rounded = {name: t if t is None or name == "cu_seqlens" else t.bfloat16() for name, t in inputs.items()}
    wanted, state = m2rnn(**rounded, kernel="reference")
    assert torch.equal(y, wanted) and torch.equal(final, state.bfloat16())
    leaves = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    assert [name.split(":")[1] for name in gradients] == list(leaves)
    for (name, t), gradient in zip(leaves.items(), gradients.values()):
        assert gradient.dtype == t.dtype and gradient.shape == t.shape and gradient.abs().max() > 0, name


@pytest.mark.parametrize(
    ("dtype", "B", "installed", "device", "words"),
    [
        (torch.bfloat16, 2, True, "h200", []),
        (torch.float32, 2, True, "h200", []),
        (torch.bfloat16, 2, False, "cpu", ["needs a CUDA device", "xma is not installed"]),
        (torch.float64, 2, True, "h200", ["fp64"]),
        (torch.bfloat16, 21, True, "h200", ["32-bit offsets"]),
        (torch.float64, 21, False, "cpu", ["needs a CUDA device", "xma is not installed", "fp64", "32-bit offsets"]),
    ],
)
@pytest.mark.parametrize("sequences", [None, 8])
def test_xma_refuses_what_it_cannot_do(monkeypatch, dtype, B, installed, device, words, sequences):
    found = SimpleNamespace(name="xma") if installed else None
    monkeypatch.setattr(bench.peers.importlib.util, "find_spec", lambda module: found)
    B, S = (B, 4096) if sequences is None else (1, B * 4096)
    problem = Problem.of(
        "m2rnn",
        device=DEVICES[device],
        q=Spec((B, S, 1, 64), dtype),
        k=Spec((B, S, 1, 64), dtype),
        v=Spec((B, S, 51, 16), dtype),
        cu_seqlens=sequences and Spec((sequences + 1,), torch.int32),
    )
    (kernel,) = bench.peers.xma.KERNELS
    reasons = kernel.reasons(problem, by_name=True)
    assert len(reasons) == len(words) and all(word in reason for word, reason in zip(words, reasons)), reasons


@pytest.mark.parametrize("module", [bench_mamba2, bench_mamba3])
def test_the_scans_cases(module):
    cases = module.CASES
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    recipes = [name.removesuffix(" B2 S4096 H128 P64 G8 N128") for name in names[: 1 + (module is bench_mamba3)]]
    assert recipes in (["B2 S4096 H128 P64 G8 N128"], ["rank4", "siso"])
    beside = [case for case in cases if case.peers]
    assert {(case.P, case.N, case.dtype) for case in beside} == {(64, 128, torch.bfloat16)}, "mamba-ssm tunes for these"
    for form in {getattr(case, "rank", None) for case in beside}:
        lengths = {case.S: case.B for case in beside if getattr(case, "rank", None) == form and case.sequences == 1}
        assert lengths == {2**n: 1 if n > 14 else 2 for n in range(10, 17)}
    for word in ("fp16", "packed8", "H112", "N64", "N256", "P32", "P128"):
        assert any(word in name.split() for name in names), word


def test_mamba3_s_retuned_cases_come_last():
    packed = [case.sequences > 1 for case in bench_mamba3.CASES]
    assert packed == sorted(packed)
    assert {case.form for case in bench_mamba3.CASES} == {"siso", "rank1", "rank2", "rank4", "rank8"}


@pytest.mark.parametrize("rank", [None, 4])
def test_mamba3_s_inputs_are_the_layer_s(rank):
    case = bench_mamba3.Case(rank, 1, 64, H=4, G=2, sequences=8)
    inputs = case.inputs("cpu")
    assert inputs["cu_seqlens"].tolist() == list(range(0, 65, 8))
    in_bf16 = {name for name, t in inputs.items() if t is not None and t.dtype == torch.bfloat16}
    assert in_bf16 == {"x", "B", "C", "trap", "angles", "z"}
    for name in "BC":
        torch.testing.assert_close(
            inputs[name].float().square().mean(-1), torch.ones(1, 64, rank or 1, 2), rtol=0.02, atol=0
        )
    dt, log_decay = inputs["dt"], inputs["log_decay"]
    assert dt.stride() == (4 * 64, 1, 4) == log_decay.stride(), "views of [B, S, H], as the projection leaves them"
    assert dt.min() > 0 and dt.median() < 0.1 and (log_decay / dt).max() <= -1e-4
    means = {"psi": 1 / 4, "zeta": 1, "phi": 1 / 4} if rank else {}
    for name, mean in {"B_bias": 1, "C_bias": 1, "D": 1, **means}.items():
        assert inputs[name].mean().item() == pytest.approx(mean, rel=0.3) and inputs[name].std() > 0.02 * mean, name
    y = bench_mamba3.scan("reference", **inputs)
    assert y.isfinite().all() and y.float().std() > 0.1


def test_mamba2_s_inputs_are_the_mixer_s():
    inputs = bench_mamba2.Case(1, 64, H=4, G=2, sequences=8).inputs("cpu")
    assert {name for name, t in inputs.items() if t.dtype == torch.float32} == {"A", "D", "dt_bias"}
    assert -16 <= inputs["A"].min() and inputs["A"].max() <= -1
    y = bench_mamba2.scan("reference", **inputs)
    assert y.isfinite().all() and y.float().std() > 0.1


def test_the_scans_arithmetic():
    case = bench_mamba3.Case(4, 1, 16, H=1, G=1)
    rows = 4 * 16
    products = (rows * rows * 128, rows * rows * 64, rows * 128 * 64, rows * 64 * 128)  # C Bᵀ, scores v, C S, vᵀ B
    assert case.flops() == {"fwd": 2 * sum(products), "fwd+bwd": 6 * sum(products)}
    assert bench_mamba3.Case(None, 1, 64, H=1, G=1).flops() == case.flops()
    assert bench_mamba2.Case(1, 64, H=1, G=1).flops() == case.flops()
    assert bench_mamba2.Case(1, 64, H=16, G=1).flops()["fwd"] == 2 * (16 * sum(products[1:]) + products[0])
    inputs = bench_mamba3.Case(None, 1, 64, H=4, G=2).inputs("cpu")
    read = sum(t.nbytes for t in inputs.values() if t is not None)
    assert bench_mamba3.moved(inputs) == {
        "fwd": read + inputs["x"].nbytes,
        "fwd+bwd": 3 * read + 2 * inputs["x"].nbytes,
    }


def mamba_ssm_standing_in(name):
    """mamba-ssm's functions by their modules, signatures and layouts, computed by our references."""

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, *, D, z, dt_bias, initial_states, seq_idx, dt_softplus):
        assert chunk_size == 128
        ends = None
        if seq_idx is not None:
            assert seq_idx.shape == x.shape[:2] and seq_idx.dtype == torch.int32
            ends = [0, *(seq_idx[0].diff().nonzero()[:, 0] + 1).tolist(), x.shape[1]]
            ends = torch.tensor(ends, dtype=torch.int32)
        return mamba2_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, ends, kernel="reference")[0]

    def mamba3_siso_combined(
        Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, Input_States, chunk_size, cu_seqlens
    ):
        assert chunk_size == 64 and (Q.ndim, K.ndim, Q_bias.ndim, K_bias.ndim) == (4, 4, 2, 2)
        assert Angles.shape[2] == V.shape[2] and {t.dtype for t in (Q, K, V, Trap, Angles, Z)} == {torch.bfloat16}
        state = None
        if Input_States is not None:
            angle, ssm, k, v = Input_States
            state = Mamba3State(ssm, k[:, :, None], v[:, :, None], angle)
        arguments = (V, K[:, :, None], Q[:, :, None], DT, ADT, Trap, Angles, K_bias[:, None], Q_bias[:, None], D, Z)
        return mamba3_scan(*arguments, initial_state=state, cu_seqlens=cu_seqlens, kernel="reference")[0]

    def mamba3_mimo(
        Q, K, V, ADT, DT, Trap, Q_bias, K_bias, MIMO_V, MIMO_Z, MIMO_Out, Angles, D, Z, chunk_size, rotary_dim_divisor,
        dtype, cu_seqlens,
    ):  # fmt: skip
        assert chunk_size * Q.shape[2] == 64 and rotary_dim_divisor * Angles.shape[3] == Q.shape[4]
        assert {t.dtype for t in (Q, K, V, Trap, Z)} == {dtype} and Angles.dtype == torch.float32
        mimo = (MIMO_V, MIMO_Z, MIMO_Out)
        arguments = (V, K, Q, DT, ADT, Trap, Angles, K_bias, Q_bias, D, Z)
        return mamba3_scan(*arguments, mimo=mimo, cu_seqlens=cu_seqlens, kernel="reference")[0]

    return SimpleNamespace(
        **{
            "ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
            "ops.triton.mamba3.mamba3_siso_combined": {"mamba3_siso_combined": mamba3_siso_combined},
            "ops.tilelang.mamba3.mamba3_mimo": {"mamba3_mimo": mamba3_mimo},
        }[name]
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["mamba2", "siso", "siso with a state", "rank4"])
def test_mamba_ssm_is_given_what_it_wants(monkeypatch, form, packed):
    monkeypatch.setattr(bench.peers.mamba_ssm, "_module", mamba_ssm_standing_in)
    rows = 3 if packed else 2
    small = {"B": 1 if packed else 2, "S": 12, "H": 4, "P": 8, "G": 2, "N": 16}
    if form == "mamba2":
        inputs = bench_mamba2.Case(**small).inputs("cpu") | {"z": None, "dt_softplus": True}
        inputs["initial_state"] = None if packed else torch.randn(rows, 4, 8, 16, requires_grad=True)
        peer, ours = bench.peers.mamba_ssm.mamba2_scan, mamba2_scan
    else:
        inputs = bench_mamba3.Case(rank=4 if form == "rank4" else None, **small).inputs("cpu")
        if form == "rank4":
            inputs["mimo"] = tuple(inputs.pop(name) for name in ("psi", "zeta", "phi"))
        if form == "siso with a state":
            shapes = (8, 16), (1, 16), (1, 8), (4,)
            state = Mamba3State(*(torch.rand(rows, 4, *shape, requires_grad=True) for shape in shapes))
            inputs["initial_state"] = state
        peer, ours = bench.peers.mamba_ssm.mamba3_scan, mamba3_scan
    inputs["cu_seqlens"] = torch.tensor([0, 5, 6, 12], dtype=torch.int32) if packed else None
    torch_only = {name: value for name, value in inputs.items() if name != "dt_softplus"}
    options = {"dt_softplus": True} if form == "mamba2" else {}
    (y,), gradients = outputs_and_gradients(lambda **given: peer(**given, **options), torch_only, None)
    (wanted,), exact = outputs_and_gradients(
        lambda **given: ours(**given, **options, kernel="reference")[:1], torch_only, None
    )
    assert torch.equal(y, wanted)
    assert list(gradients) == list(exact)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, exact[name], rtol=0.02, atol=0.02 * exact[name].abs().max().item())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, []),
        ({"rank": None}, []),
        ({"rank": None, "tilelang": None}, []),
        ({"device": "cpu", "mamba_ssm": None}, ["needs a CUDA device", "mamba_ssm is not installed"]),
        ({"dtype": torch.float32}, ["computes in bf16"]),
        ({"gates": torch.bfloat16}, ["wants dt, log_decay in fp32"]),
        ({"rank": None, "P": 48}, ["powers of two, not P 48"]),
        ({"tilelang": None}, ["tilelang is not installed: MIMO needs 0.1.8"]),
        ({"tilelang": "0.1.15"}, ["tilelang is 0.1.15: MIMO needs 0.1.8"]),
        ({"state": True}, ["takes no initial state"]),
        ({"rank": None, "state": True}, []),
        ({"pairs": 16}, ["N / 4 or N / 2 pairs, not 16 of N 128"]),
        ({"rank": 3, "S": 65536}, ["rank 1, 2, 4 or 8, not 3", "32-bit offsets"]),
        ({"S": 32768}, []),
        ({"rank": None, "S": 65536}, []),
    ],
)
def test_mamba_ssm_s_mamba3_refuses_what_it_cannot_do(monkeypatch, given, words):
    asked = {
        "rank": 4,
        "S": 4096,
        "P": 64,
        "dtype": torch.bfloat16,
        "gates": torch.float32,
        "pairs": 32,
        "state": False,
    }
    asked = SimpleNamespace(**(asked | {"device": "h200", "mamba_ssm": "2.3.2", "tilelang": "0.1.8"} | given))
    monkeypatch.setattr(bench.peers.mamba_ssm.importlib.util, "find_spec", lambda module: getattr(asked, module))
    monkeypatch.setattr(bench.peers.mamba_ssm.importlib.metadata, "version", lambda module: getattr(asked, module))
    R, S, P = asked.rank or 1, asked.S, asked.P
    parameter = Spec((128, R, P), torch.float32) if asked.rank else None
    problem = Problem.of(
        "mamba3_scan",
        device=DEVICES[asked.device],
        x=Spec((1, S, 128, P), asked.dtype),
        B=Spec((1, S, R, 8, 128), asked.dtype),
        dt=Spec((1, 128, S), asked.gates),
        log_decay=Spec((1, 128, S), asked.gates),
        angles=Spec((1, S, 1, asked.pairs), asked.dtype),
        **dict.fromkeys(("B_bias", "C_bias"), Spec((128, R, 128), torch.float32)),
        D=Spec((128,), torch.float32),
        **dict.fromkeys(("psi", "zeta", "phi"), parameter),
        initial_state=Spec((1, 128, P, 128), torch.float32) if asked.state else None,
    )
    kernel = bench.peers.mamba_ssm.KERNELS[1]
    reasons = kernel.reasons(problem, by_name=True)
    assert len(reasons) == len(words) and all(word in reason for word, reason in zip(words, reasons)), reasons


def test_mamba_ssm_s_mamba2_refuses_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr(bench.peers.mamba_ssm.importlib.util, "find_spec", lambda module: module)
    kernel = bench.peers.mamba_ssm.KERNELS[0]

    def reasons(dtype, *given):
        some = {name: Spec((2,), torch.int32) if name in given else None for name in ("cu_seqlens", "initial_state")}
        problem = Problem.of("mamba2_scan", device=DEVICES["h200"], x=Spec((1, 8, 4, 8), dtype), **some)
        return kernel.reasons(problem, by_name=True)

    assert not reasons(torch.float16, "cu_seqlens") and not reasons(torch.float32, "initial_state")
    double, packed = reasons(torch.float64, "cu_seqlens", "initial_state")
    assert "fp64" in double and "packed" in packed


def test_mamba_ssm_s_modules_are_imported_without_its_root(monkeypatch, tmp_path):
    (tmp_path / "mamba_ssm" / "ops").mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import no_such_extension")
    (tmp_path / "mamba_ssm" / "ops" / "__init__.py").write_text("")
    (tmp_path / "mamba_ssm" / "ops" / "scan.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.scan"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert bench.peers.mamba_ssm._module("ops.scan").answer == 42
    assert bench.peers.mamba_ssm._module("ops.scan").answer == 42
    assert not bench.peers.not_installed("mamba_ssm")(Problem.of("m2rnn", device=DEVICES["h200"]))
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.scan"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.gpu
def test_timing_on_a_gpu():
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    records, _ = bench.measure.case("rms_norm", "1024", "torch", lambda kernel: x * 2, grad=[x])
    forward, both = records
    assert 0 < forward["ms"] < both["ms"] < 10
    assert forward["peak_mib"] == 4 and both["peak_mib"] >= 4


def test_mla_s_cases():
    cases = {(case.op, case.name): case for case in bench_mla.CASES}
    assert len(cases) == len(bench_mla.CASES)
    whole, packings = ("B2 S4096", "B1 S16384", "B1 S65536"), ("B1 S8192 H32 {} packed8", "B1 S16384 H32 {} ragged8")
    for op, dims in (("latent_attention", "128/64"), ("mla_attention", "192/128")):
        names = (*(f"{size} H32 {dims}" for size in whole), *(packing.format(dims) for packing in packings))
        for name in names:
            assert (op, name) in cases and (op, f"{name} rope") in cases
    for name in ("B2 S4096 H32 128/64", "B1 S4096 H28 128/64", "B1 S4096 H128 192/128"):
        assert ("mla_attention", name) in cases
    for case in cases.values():
        assert not case.lengths or (case.B, sum(case.lengths)) == (1, case.S)
        assert all(
            peer.startswith("peer:varlen" if case.lengths else "peer:cudnn") for peer in case.peers if peer != "torch"
        )


def test_mla_s_arithmetic():
    case = bench_mla.Case("latent_attention", 1, 10, 3, 4, 2, 4, lengths=(7, 3))
    seen = bench_mla.reference.visible(10, 10, True, case.options("cpu")["cu_seqlens"], 0, "cpu").sum().item()
    assert case.flops() == {"fwd": 3 * seen * 2 * (6 + 4), "fwd+bwd": 9 * seen * 2 * (6 + 4)}
    assert bench_mla.Case("mla_attention", 2, 4, 3).flops()["fwd"] == 2 * 3 * 10 * 2 * (128 + 64)
    for op in bench_mla.OPERATORS:
        case = bench_mla.Case(op, 2, 5, 3)
        inputs = case.inputs("cpu")
        out = bench_mla.OPERATORS[op](**inputs, **case.options("cpu"))
        read = sum(t.nbytes for t in inputs.values())
        assert case.moved() == {"fwd": read + out.nbytes, "fwd+bwd": 3 * (read + out.nbytes)}


def varlen_standing_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """torch.nn.attention.varlen's signature and wishes, computed by the reference."""
    assert cu_seq_q is cu_seq_k and max_q == max_k == cu_seq_q.diff().max() and window_size == (-1, 0)
    assert query.shape[2] == key.shape[2] == value.shape[2] and key.shape == value.shape
    k, v = (t[None].expand(-1, -1, query.shape[1], -1) for t in (key, value))
    arguments = {"scale": scale, "cu_seqlens": cu_seq_q, "kernel": "reference"}
    return bench_mla.mla_attention(query[None], k, query.new_empty(1, len(query), 0), v, **arguments)[0]


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("lengths", [(), (5, 1, 6)])
@pytest.mark.parametrize(("op", "Dn", "Dv"), [("latent_attention", 8, 8), ("mla_attention", 16, 8)])
def test_mla_s_peers_compute_what_ours_does(monkeypatch, op, Dn, Dv, lengths, rope):
    pinned = []
    monkeypatch.setattr(bench.peers.cudnn, "sdpa_kernel", lambda backend: pinned.append(backend) or nullcontext())
    monkeypatch.setattr(bench.peers.cudnn, "varlen_attn", varlen_standing_in)
    one_graph = torch.compile(bench.peers.cudnn.prepared, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(bench_mla, "compiled", lambda: one_graph)
    case = bench_mla.Case(op, 1 if lengths else 2, 12, 4, Dn, 8, Dv, lengths, rope)
    inputs = case.inputs("cpu")
    run, leaves = case.calls(inputs)
    assert leaves[: len(inputs)] == list(inputs.values()) and all(t.is_leaf and t.requires_grad for t in leaves)
    ours = run("reference")
    dy = torch.randn_like(ours)
    (wanted,) = torch.autograd.grad(ours, inputs["q"], dy)
    used = set()
    for name in case.peers:
        out = run(name)
        assert out.shape[-1] == (case.Dn + case.Dr if lengths and name != "torch" else Dv), name
        gradients = torch.autograd.grad(out[..., :Dv], leaves, dy, allow_unused=True)
        used |= {i for i, gradient in enumerate(gradients) if gradient is not None}
        for mine, theirs in ((ours, out[..., :Dv]), (wanted, gradients[0])):
            torch.testing.assert_close(theirs, mine, rtol=0.03, atol=0.03 * mine.abs().max().item(), msg=name)
    assert used >= set(range(len(inputs), len(leaves))), "a leaf of the peers' that none of them uses"
    assert bool(pinned) == (not lengths) and set(pinned) <= {bench.peers.cudnn.SDPBackend.CUDNN_ATTENTION}


def test_the_peers_rope_is_megatron_s():
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    t, freqs = torch.randn(2, 7, 3, 8).bfloat16(), 5 * torch.randn(7, 1, 4).repeat(1, 1, 2)
    wanted = _apply_rotary_pos_emb_bshd(t, freqs, mla_rotary_interleaved=True)
    assert torch.equal(bench.peers.cudnn.turned(t, freqs.cos().bfloat16(), freqs.sin().bfloat16()), wanted)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, []),
        ({"D": 192, "Dv": 128}, []),
        ({"device": "cpu"}, ["needs a CUDA device"]),
        ({"device": "a100", "D": 192, "Dv": 128}, ["no bfloat16, 8 tokens, head dims 192/128"]),
        ({"dtype": torch.float32, "lse": True}, ["no float32", "logsumexp"]),
        ({"Dv": 60}, ["head dims 128/60"]),
        ({"T": 16}, ["query_offset"]),
        ({"offset": 3, "packed": True}, ["packed", "query_offset"]),
    ],
)
@pytest.mark.parametrize("op", ["latent_attention", "mla_attention"])
def test_cudnn_refuses_what_it_cannot_do(op, given, words):
    asked = {"device": "h200", "dtype": torch.bfloat16, "D": 128, "Dv": 64, "T": 8, "packed": False, "lse": False}
    asked = SimpleNamespace(**(asked | {"offset": 0} | given))
    tensors = {"v": Spec((1, asked.T, 4, asked.Dv), asked.dtype)}
    if op == "latent_attention":
        tensors = {"kv": Spec((1, asked.T, asked.D), asked.dtype), "value_dim": asked.Dv}
    problem = Problem.of(
        op,
        device=DEVICES[asked.device],
        q=Spec((1, 8, 4, asked.D), asked.dtype),
        **tensors,
        cu_seqlens=Spec((3,), torch.int32) if asked.packed else None,
        query_offset=asked.offset,
        return_lse=asked.lse,
    )
    (kernel,) = (kernel for kernel in bench.peers.cudnn.KERNELS if kernel.operator == op)
    reasons = kernel.reasons(problem, by_name=True)
    assert len(reasons) == len(words) and all(word in reason for word, reason in zip(words, reasons)), reasons


@pytest.mark.parametrize("op", ["latent_attention", "mla_attention"])
def test_cudnn_as_a_kernel_is_the_operator(monkeypatch, op):
    monkeypatch.setattr(bench.peers.cudnn, "sdpa_kernel", lambda backend: nullcontext())
    case = bench_mla.Case(op, 2, 9, 3, 8, 8, 8)
    inputs, options = (
        {name: t.detach().double().requires_grad_() for name, t in case.inputs("cpu").items()},
        case.options("cpu"),
    )
    (kernel,) = (kernel for kernel in bench.peers.cudnn.KERNELS if kernel.operator == op)
    rest = {"causal": True, "query_offset": 0, "return_lse": False}
    outputs, gradients = outputs_and_gradients(lambda **given: kernel.run(**given, **options, **rest), inputs, None)
    wanted, exact = outputs_and_gradients(lambda **given: bench_mla.OPERATORS[op](**given, **options), inputs, None)
    torch.testing.assert_close(outputs, wanted)
    torch.testing.assert_close(gradients, exact)
