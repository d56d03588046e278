"""Set-up: the scripts, the pins, the interpreter search, the spill check, and what the extension says of itself."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch

from nam56r.kernels import extension
from nam56r.kernels.registry import DEVICES, Device, Problem

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["ci/setup", "ci/test", "ci/demo", "ci/gpu", ".ci/run"]


def load(path: Path):
    loader = SourceFileLoader(path.name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(path.name, loader))
    sys.modules[path.name] = module
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_can_be_started(script):
    path = ROOT / script
    assert path.stat().st_mode & 0o111, f"{script} is not executable"
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", path], check=True)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    return {normal(n): v for n, v in (line.split("==") for line in (ROOT / "constraints.txt").read_text().split())}


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins()
    seen = set()
    open_names = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    while open_names:
        asked = open_names.pop()
        name = normal(re.match(r"[\w.-]+", asked)[0])
        marker = asked.partition(";")[2]
        if (
            name in seen
            or "extra" in marker
            or re.search(r"win32|Windows|darwin|python_version *< *.3\.1[0-2]", marker)
        ):
            continue
        seen.add(name)
        assert name in pinned, f"{asked} is not pinned in constraints.txt"
        try:
            open_names += importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            pass  # another platform's: a marker left it out
    assert pinned["torch"] == "2.11.0" and pinned["triton"] == "3.6.0" and pinned["megatron-core"] == "0.19.2"


def fake_python(path: Path, version: str) -> Path:
    """An interpreter that says it is of a version and knows nothing else."""
    major, minor = version.split(".")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n[[ {major} -eq 3 && {minor} -ge 12 && {minor} -le 14 ]]\n")
    path.chmod(0o755)
    return path


def which_python(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    return subprocess.run(
        [shutil.which("bash"), ROOT / "ci" / "setup", "--python"],
        env={"PATH": f"{tmp_path / 'bin'}:{tools}", "HOME": str(tmp_path / "home"), **environment},
        capture_output=True,
        text=True,
    )


def test_setup_takes_the_interpreter_that_is_asked_for(tmp_path):
    fake_python(tmp_path / "bin" / "python3", "3.12")
    asked = fake_python(tmp_path / "mine" / "python", "3.13")
    found = which_python(tmp_path, PYTHON=str(asked))
    assert found.returncode == 0 and found.stdout.strip() == str(asked) and not found.stderr


def test_setup_passes_over_interpreters_that_are_too_old(tmp_path):
    old = fake_python(tmp_path / "bin" / "python3", "3.11")
    fake_python(tmp_path / "bin" / "python3.12", "3.11")  # a shim that answers with another version
    right = fake_python(tmp_path / "home" / ".pyenv" / "versions" / "3.13.0" / "bin" / "python3", "3.13")
    found = which_python(tmp_path, PYTHON=str(old))
    assert found.returncode == 0 and found.stdout.strip() == str(right)
    assert f"PYTHON={old}" in found.stderr


def test_setup_says_that_there_is_no_interpreter(tmp_path):
    fake_python(tmp_path / "bin" / "python3", "3.11")
    found = which_python(tmp_path)
    assert found.returncode == 1 and not found.stdout
    assert len(found.stderr.splitlines()) == 1 and "no Python 3.12 to 3.14" in found.stderr


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_90a'
ptxas info    : Function properties for _Z5cleanPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_90a'
ptxas info    : Function properties for _Z5spillPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 400 bytes cmem[0]
"""


def test_the_spill_check_reads_ptxas():
    spills = load(ROOT / "ci" / "spills")
    clean, spilled = spills.parse(REPORT)
    assert clean == ("_Z5cleanPf", 24, 2048, 0, 0)
    assert spilled == ("_Z5spillPf", 32, 0, 16, 20)
    with pytest.raises(ValueError, match="says nothing of the frame of _Z5cleanPf"):
        spills.parse("ptxas info    : Function properties for _Z5cleanPf\n")


SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) crowded(float* x) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = x[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[threadIdx.x + 1024 * i] = a[i] * a[63 - i];
}
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_spill_check_fails_on_a_planted_spill(tmp_path):
    (tmp_path / "ci").mkdir()
    shutil.copy(ROOT / "ci" / "spills", tmp_path / "ci")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "crowded.cu").write_text(SPILLS)
    check = [sys.executable, tmp_path / "ci" / "spills"]
    for _ in range(2):  # the second time from the kept report
        found = subprocess.run(check, capture_output=True, text=True)
        assert found.returncode == 1 and "1 compiled, 1 kernels spill" in found.stdout, found
    (tmp_path / "csrc" / "crowded.cu").write_text(
        SPILLS.replace("1024, 2", "1024, 1").replace("64", "8").replace("63", "7")
    )
    found = subprocess.run(check, capture_output=True, text=True)
    assert found.returncode == 0 and "0 kernels spill" in found.stdout, found


@pytest.mark.parametrize(
    "arch, runs_on, not_on",
    [
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("89", [(8, 9)], [(8, 6)]),
        ("100f", [(10, 0), (10, 3)], [(11, 0)]),
        ("120a", [(12, 0)], [(12, 1)]),
    ],
)
def test_what_an_architecture_covers(arch, runs_on, not_on):
    assert all(extension.covers(arch, capability) for capability in runs_on)
    assert not any(extension.covers(arch, capability) for capability in not_on)


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(extension, "archs", lambda: ("80", "90a"))


def reason(device: Device) -> tuple[str, ...]:
    return extension.reason(Problem.of("causal_conv1d", device=device))


def test_the_extension_serves_the_devices_it_was_built_for(built):
    assert reason(DEVICES["h200"]) == reason(DEVICES["a100"]) == ()
    (why,) = reason(DEVICES["b200"])
    assert why == "CUDA extension built for sm_80, sm_90a, but b200 is sm_100: install with NAM56R_CUDA_ARCHS=100"
    (why,) = reason(DEVICES["cpu"])
    assert why == "a CUDA kernel, but the device is cpu"


def test_an_extension_that_is_not_there_says_why(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.delitem(sys.modules, extension.MODULE, raising=False)
    monkeypatch.setattr(extension.importlib, "import_module", missing)
    monkeypatch.setattr(extension, "RECORD", tmp_path / "_build.txt")
    monkeypatch.setattr(extension, "load", extension._load.__wrapped__)
    assert reason(DEVICES["h200"]) == ("CUDA extension not built",)
    extension.RECORD.write_text("not built: no nvcc on PATH and no CUDA_HOME\n")
    assert reason(DEVICES["h200"]) == ("CUDA extension not built: no nvcc on PATH and no CUDA_HOME",)
    extension.RECORD.write_text("built for sm_90a\n")
    assert reason(DEVICES["h200"]) == ("CUDA extension not there, though built for sm_90a: install the package again",)
    assert extension.archs() == ()


def test_an_extension_that_does_not_load_says_why(monkeypatch):
    def broken(name):
        raise ImportError("libcudart.so.13: cannot open shared object file\nmore")

    monkeypatch.delitem(sys.modules, extension.MODULE, raising=False)
    monkeypatch.setattr(extension.importlib, "import_module", broken)
    assert extension._load.__wrapped__() == "built, but does not load: libcudart.so.13: cannot open shared object file"


class Lazy(types.ModuleType):
    """A module that imports another when it is looked at."""

    def __getattribute__(self, name):
        sys.modules[f"{__name__}.imported_{len(sys.modules)}"] = sys
        return super().__getattribute__(name)


@pytest.mark.parametrize("ask", [lambda problem: len(extension.reason(problem)), lambda _: len(extension.archs())])
def test_a_traced_program_asks_for_the_extension(ask, monkeypatch):
    """In one graph, though modules are imported meanwhile: dynamo can trace neither an import nor sys.modules."""
    problem = Problem.of("causal_conv1d", device=DEVICES["h200"])
    monkeypatch.setitem(sys.modules, "nam56r_lazy", Lazy("nam56r_lazy"))
    torch._dynamo.reset()
    try:
        traced = torch.compile(lambda x: x + ask(problem), fullgraph=True, backend="eager")
        assert traced(torch.zeros(1)).item() == ask(problem)
    finally:
        for name in [name for name in sys.modules if name.startswith(f"{__name__}.imported_")]:
            del sys.modules[name]


def test_the_record_tells_of_the_extension_here():
    """What set-up recorded and what loads agree."""
    said = extension.RECORD.read_text().strip()
    if said.startswith("built for "):
        assert extension.load() is None
        assert said == "built for " + ", ".join(f"sm_{arch}" for arch in extension.archs())
    else:
        assert extension.load() == said


def test_setup_py_refuses_an_architecture_that_is_none():
    found = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "NAM56R_CUDA_ARCHS": "hopper"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1 and "NAM56R_CUDA_ARCHS has 'hopper'" in found.stderr


def test_a_wheel_holds_the_sources_that_are_compiled_at_run_time(tmp_path):
    tree = tmp_path / "tree"
    leave = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("nam56r", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    env = os.environ | {"NAM56R_SKIP_CUDA_BUILD": "1"}
    build = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", tmp_path]
    subprocess.run(build, cwd=tree, env=env, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        shipped = {name for name in packed.namelist() if name.startswith("nam56r/csrc/")}
        packed.extractall(tmp_path / "installed")
    headers = sorted(path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.cuh"))
    assert shipped == {f"nam56r/csrc/{header}" for header in headers} and headers
    show = "from nam56r.kernels import nvrtc; print(nvrtc.SOURCES); print(nvrtc.source('conv1d', 'device.cuh'))"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    said = subprocess.run([sys.executable, "-c", show], env=env, cwd=tmp_path, capture_output=True, text=True)
    place, _, text = said.stdout.partition("\n")
    assert place == str(tmp_path / "installed" / "nam56r" / "csrc"), said.stderr
    assert "namespace nam56r::conv1d" in text
