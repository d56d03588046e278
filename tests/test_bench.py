"""What the bench records, checked without a GPU: a timer that is told what to say stands in for the clock."""

import json

import pytest
import torch

import bench.measure
import bench.peers
from bench import record as recording
from bench.measure import Measured
from nam56r.kernels.registry import NoKernel, Problem

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


@pytest.mark.gpu
def test_timing_on_a_gpu():
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    records, _ = bench.measure.case("rms_norm", "1024", "torch", lambda kernel: x * 2, grad=[x])
    forward, both = records
    assert 0 < forward["ms"] < both["ms"] < 10
    assert forward["peak_mib"] == 4 and both["peak_mib"] >= 4
