"""Kernels compiled at run time: the source text, the folder, and what is said. That they run is a family's test."""

import logging
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import cupy.cuda
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nam56r.kernels import nvrtc
from nam56r.kernels.registry import DEVICES

FILES = {
    "tiny/scale.cuh": """\
// Scales.
#pragma once
#include "tiny/index.cuh"
#include "tiny/factor.cuh"
namespace nam56r::tiny {
template <typename T, int N>
__global__ void scale(T* x, int n) {
  if (index() < n) x[index()] *= factor(N);
}
}
""",
    "tiny/factor.cuh": """\
#pragma once
#include "tiny/index.cuh"
namespace nam56r::tiny {
constexpr int factor(int n) { return n * 7; }
}
""",
    "tiny/index.cuh": """\
#pragma once
namespace nam56r::tiny {
__device__ inline int index() { return blockIdx.x * blockDim.x + threadIdx.x; }
}
""",
}
SCALE = ("nam56r::tiny::scale<float, 3>", "nam56r::tiny::scale<int, 5>")


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """A csrc of one family, and an empty folder."""
    for path, text in FILES.items():
        (tmp_path / "csrc" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / path).write_text(text)
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path / "csrc")
    monkeypatch.setenv("NAM56R_CACHE_DIR", str(tmp_path / "cache"))
    nvrtc._warn_once.cache_clear()
    return tmp_path / "csrc"


def compiled(arch="sm_90a", expressions=SCALE):
    return nvrtc.compile("tiny", "scale.cuh", expressions, arch)


@pytest.fixture
def compilations(monkeypatch):
    """The options of every compilation from here on."""
    asked, really = [], nvrtc._compile
    monkeypatch.setattr(nvrtc, "_compile", lambda *given: asked.append(given) or really(*given))
    return asked


def test_it_compiles_without_a_gpu(csrc):
    unit, cubin = compiled()
    assert cubin.startswith(b"\x7fELF") and unit.size == len(cubin)
    assert tuple(unit.names) == SCALE and len(set(unit.names.values())) == 2
    assert all(f"\0{symbol}\0".encode() in cubin for symbol in unit.names.values())
    assert unit.what == ("scale<float, 3>", "scale<int, 5>")
    assert re.fullmatch(r"tiny-scale-float-3-sm_90a-[0-9a-f]{16}\.cubin", unit.file)
    assert (nvrtc.folder() / unit.file).read_bytes() == cubin
    assert nvrtc.cached() == [unit]


def test_the_second_time_reads_the_folder_and_says_nothing(csrc, caplog, compilations):
    caplog.set_level(logging.INFO, "nam56r")
    first = compiled()
    (record,) = caplog.records
    assert record.levelno == logging.INFO and re.search(r" in \d+\.\d s: ", record.getMessage())
    assert "tiny scale<float, 3>, scale<int, 5> for sm_90a" in record.getMessage()
    assert compiled() == first
    assert len(compilations) == len(caplog.records) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda csrc, patch: compiled("sm_80"),
        lambda csrc, patch: compiled(expressions=SCALE[:1]),
        lambda csrc, patch: compiled(expressions=SCALE[::-1]),
        lambda csrc, patch: (csrc / "tiny/index.cuh").open("a").write("// more\n") and compiled(),
        lambda csrc, patch: patch.setattr(nvrtc, "_version", lambda: "99.0") or compiled(),
        lambda csrc, patch: patch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "-use_fast_math")) or compiled(),
    ],
)
def test_whatever_a_kernel_depends_on_makes_another_file(csrc, monkeypatch, compilations, change):
    first, _ = compiled()
    other, _ = change(csrc, monkeypatch)
    assert other.key != first.key and other.file != first.file and len(compilations) == 2
    assert sorted(nvrtc.cached(), key=lambda unit: unit.compiled) == [first, other]


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_never_makes_another_kernel(csrc, data):
    """Any cut or any byte changed, in the CUBIN or in what is said of it, gives the right kernel or a new one."""
    shutil.rmtree(nvrtc.folder(), ignore_errors=True)
    unit, cubin = compiled()
    path = nvrtc.folder() / unit.file
    victim = data.draw(st.sampled_from([path, path.with_suffix(".json")]))
    content = bytearray(victim.read_bytes())
    at = int(data.draw(st.floats(0, 1, exclude_max=True)) * len(content))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    victim.write_bytes(content)
    nvrtc.cached()
    again, same = compiled()
    assert (again.key, again.names, same) == (unit.key, unit.names, cubin)


def test_files_that_are_gone_or_another_unit_s_are_compiled_again(csrc, compilations):
    unit, cubin = compiled()
    other, others = compiled("sm_80")
    path, said = nvrtc.folder() / unit.file, (nvrtc.folder() / unit.file).with_suffix(".json")
    path.unlink()
    assert nvrtc.cached() == [other]
    assert compiled()[1] == cubin and len(compilations) == 3
    said.unlink()
    assert compiled()[1] == cubin and len(compilations) == 4
    path.write_bytes(others)
    said.write_text((nvrtc.folder() / other.file).with_suffix(".json").read_text())
    assert compiled()[1] == cubin and len(compilations) == 5
    assert compiled()[1] == cubin and len(compilations) == 5


def test_a_folder_that_cannot_be_written_is_said_once(csrc, monkeypatch, caplog, compilations):
    good = compiled()
    (csrc.parent / "file").write_text("")
    monkeypatch.setenv("NAM56R_CACHE_DIR", str(csrc.parent / "file" / "kernels"))
    assert [compiled()[1], compiled()[1]] == [good[1]] * 2 and len(compilations) == 3
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(csrc.parent / "file" / "kernels") in warning and "NAM56R_CACHE_DIR" in warning and "\n" not in warning
    assert nvrtc.cached() == []


def test_many_at_once_leave_whole_files(csrc):
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: compiled(), range(12)))
    assert len({(unit.key, cubin) for unit, cubin in results}) == 1
    (unit,) = nvrtc.cached()
    assert {path.name for path in nvrtc.folder().iterdir()} == {unit.file, unit.file.replace(".cubin", ".json")}


def test_a_kernel_that_does_not_compile_says_where(csrc):
    path = csrc / "tiny" / "index.cuh"
    path.write_text(path.read_text().replace("blockIdx.x", "blockIndex.x"))
    with pytest.raises(RuntimeError) as error:
        compiled("sm_80")
    said = str(error.value)
    assert said.startswith("csrc/tiny/scale.cuh does not compile with -arch=sm_80: tiny/index.cuh(3): error:")
    assert 'identifier "blockIndex" is undefined' in said and "\n" not in said
    assert not nvrtc.folder().exists()


@pytest.mark.parametrize(
    "expressions, arch, why",
    [
        (["nam56r::tiny::shrink<float>"], "sm_90a", "shrink"),
        (SCALE, "sm_52", "invalid value for --gpu-architecture"),
        (["nam56r::tiny::scale<float, >"], "sm_90a", "error:"),
    ],
)
def test_a_kernel_or_an_architecture_that_there_is_none_of(csrc, expressions, arch, why):
    with pytest.raises(RuntimeError, match=why):
        compiled(arch, expressions)


def test_no_expression_is_refused(csrc):
    with pytest.raises(ValueError, match="tiny/scale.cuh: expressions is empty, but must name a kernel"):
        compiled(expressions=[])


def test_only_files_of_csrc_are_included(csrc, monkeypatch):
    (csrc / "tiny" / "stray.cuh").write_text('\n#include "index.cuh"\n')
    with pytest.raises(
        ValueError, match=r'^tiny/stray.cuh:2 includes "index.cuh", but .*/csrc/index.cuh can\'t be read'
    ):
        nvrtc.source("tiny", "stray.cuh")
    with pytest.raises(ValueError, match=r'^asked for "tiny/none.cuh", but '):
        nvrtc.source("tiny", "none.cuh")
    # a header that the compiler would find beside the source or in the working folder isn't covered by the key
    monkeypatch.chdir(csrc)
    (csrc / "tiny" / "angle.cuh").write_text("#include <index.cuh>\n__global__ void nothing() {}\n")
    (csrc / "index.cuh").write_text("")
    (csrc / "tiny" / "index.cuh").write_text("")
    with pytest.raises(RuntimeError, match=r"tiny/angle.cuh\(1\): catastrophic error: could not open source file"):
        nvrtc.compile("tiny", "angle.cuh", ["nothing"], "sm_90a")


@st.composite
def trees(draw):
    """Files 0..n-1; each includes some, itself and earlier ones among them. File 0 is asked for."""
    n = draw(st.integers(1, 6))
    return [draw(st.lists(st.integers(0, n - 1), max_size=4)) for _ in range(n)]


@given(trees(), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_file_is_there_once_and_keeps_its_lines(tmp_path, tree, data):
    spelt = data.draw(st.sampled_from(['#include "many/{}.cuh"', '  # include"many/{}.cuh"  // why']))
    folder = tmp_path / "csrc" / "many"
    folder.mkdir(parents=True, exist_ok=True)
    for number, includes in enumerate(tree):
        lines = ["#pragma once", *(spelt.format(other) for other in includes), f"struct File{number} {{}};"]
        (folder / f"{number}.cuh").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "SOURCES", tmp_path / "csrc")
        text = nvrtc.source("many", "0.cuh")

    expected, seen = [], set()

    def walk(number):
        seen.add(number)
        for other in tree[number]:
            if other not in seen:
                walk(other)
        expected.append(number)

    walk(0)
    where, found = None, []
    for line in text.splitlines():
        marker = re.fullmatch(r'#line (\d+) "many/(\d+)\.cuh"', line)
        if marker:
            where = (int(marker[2]), int(marker[1]))
            continue
        if line:
            number = int(re.fullmatch(r"struct File(\d+) {};", line)[1])
            assert where == (number, len(tree[number]) + 2)
            found.append(number)
        where = (where[0], where[1] + 1)
    assert found == expected


def test_the_folder_is_the_user_s_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NAM56R_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert nvrtc.folder() == tmp_path / ".cache" / "nam56r" / "kernels" and nvrtc.cached() == []
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert str(nvrtc.folder()) == "/scratch/nam56r/kernels"
    monkeypatch.setenv("NAM56R_CACHE_DIR", "~/mine")
    assert nvrtc.folder() == tmp_path / "mine"


@pytest.mark.parametrize(
    "capability, arch", [((9, 0), "sm_90a"), ((8, 0), "sm_80"), ((8, 9), "sm_89"), ((12, 0), "sm_120")]
)
def test_the_architecture_is_the_device_s(capability, arch):
    assert nvrtc.arch_of(capability) == arch


@given(st.integers(7, 20), st.integers(0, 9))
def test_an_architecture_runs_on_its_device_or_is_refused(major, minor):
    known = cupy.cuda.nvrtc.getSupportedArchs()
    runs = [arch for arch in known if divmod(arch, 10)[0] == major and divmod(arch, 10)[1] <= minor]
    reasons = nvrtc.reason("new", (major, minor))
    if runs:
        assert not reasons and nvrtc.arch_of((major, minor)).rstrip("a") == f"sm_{max(runs)}"
    else:
        (why,) = reasons
        assert why.startswith(f"new is sm_{major}{minor}, but NVRTC ") and "sm_90, " in why


def test_the_recipes_devices_are_served():
    assert not any(nvrtc.reason(name, DEVICES[name].capability) for name in ("a100", "h100", "h200", "b200"))


def test_what_is_missing_is_said_in_a_line(monkeypatch, tmp_path):
    missing = nvrtc.missing.__wrapped__
    monkeypatch.setattr(nvrtc, "missing", missing)
    assert missing() is None
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path / "none")
    assert missing() == f"the kernels' sources are not in {tmp_path / 'none'}: install the package again"

    broken = ModuleType("cupy.cuda")
    broken.nvrtc = ModuleType("nvrtc")
    said = "\n=====\nlibnvrtc.so.13: cannot open shared object file\n\nTry this\n====="
    broken.nvrtc.getVersion = lambda: (_ for _ in ()).throw(RuntimeError(said))
    monkeypatch.setitem(sys.modules, "cupy.cuda", broken)
    assert missing() == "CuPy does not load: libnvrtc.so.13: cannot open shared object file"

    monkeypatch.setitem(sys.modules, "cupy", None)
    assert missing() == "CuPy is not installed: pip install nam56r[nvrtc]"
    assert nvrtc.reason("h200", (9, 0)) == ("CuPy is not installed: pip install nam56r[nvrtc]",)
