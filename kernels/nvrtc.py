"""Kernels compiled at run time: what csrc/ holds as templates, for shapes and architectures that weren't built ahead.

A unit is one header of csrc/<family>/, the files of csrc that it includes, and the instantiations that are asked for.
CuPy's bindings of NVRTC compile it to a CUBIN, which is kept in a folder for every later process; a JSON beside it says
what it is. The key covers the whole source text, the options, the instantiations and NVRTC's version, so that no file is
ever taken for another unit. Nothing here needs a GPU: the extension loads the CUBIN (csrc/m2rnn's m2rnn_load).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).resolve().parent.parent / "csrc"  # beside kernels/ in the tree and in an installed package
# unannotated constexpr functions are for both sides, as in the build ahead; no folder is searched but csrc, and by us
OPTIONS = ("-std=c++17", "-default-device", "-no-source-include")


class Unit(BaseModel):
    """What the folder says of one compiled unit. A string below a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    family: str
    header: str
    what: tuple[str, ...]
    """Instantiations without namespaces: ("forward<BFloat16, 16, 6, 16>", "reduce<BFloat16>")."""
    arch: str
    """Such as sm_90a."""
    names: dict[str, str]
    """C++ name expression -> symbol in the CUBIN."""
    nvrtc: str
    """NVRTC's version, such as 13.0."""
    file: str
    """The CUBIN's: m2rnn-forward-BFloat16-16-6-16-sm_90a-0123456789abcdef.cubin."""
    key: str
    """SHA-256 of everything the CUBIN depends on."""
    digest: str
    """SHA-256 of the names and the CUBIN."""
    size: int
    """Bytes of the CUBIN."""
    seconds: float
    """What compiling took."""
    compiled: datetime


def folder() -> Path:
    """Where compiled units are kept: $NAM56R_CACHE_DIR, or nam56r/kernels in the user's cache folder."""
    if os.environ.get("NAM56R_CACHE_DIR"):
        return Path(os.environ["NAM56R_CACHE_DIR"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nam56r" / "kernels"


@functools.cache
def missing() -> str | None:
    """Why nothing can be compiled here, in one line; None when it can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install nam56r[nvrtc]"
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # CuPy's own, a library that doesn't load, a numpy it doesn't fit
        lines = [line.strip() for line in str(error).splitlines() if line.strip("= ")]
        return f"CuPy does not load: {lines[0] if lines else repr(error)}"
    if not SOURCES.is_dir():
        return f"the kernels' sources are not in {SOURCES}: install the package again"
    return None


def reason(name: str, capability: tuple[int, int]) -> tuple[str, ...]:
    """Why compiling at run time can't serve a CUDA device, present or planned for; empty when it can."""
    why = missing()
    if why:
        return (why,)
    try:
        arch_of(capability)
    except ValueError as error:
        return (f"{name} is {error}",)
    return ()


def arch_of(capability: tuple[int, int]) -> str:
    """What NVRTC compiles for on a device of that compute capability: (9, 0) -> sm_90a, (8, 9) -> sm_89.

    Raises ValueError when the installed NVRTC has nothing that runs there.
    """
    from cupy.cuda import nvrtc

    major, minor = capability
    known = nvrtc.getSupportedArchs()
    fitting = [arch for arch in known if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        listed = ", ".join(f"sm_{arch}" for arch in known)
        raise ValueError(f"sm_{major}{minor}, but NVRTC {_version()} compiles for {listed}: install one that knows it")
    return "sm_90a" if capability == (9, 0) else f"sm_{max(fitting)}"


def source(family: str, header: str) -> str:
    """csrc/<family>/<header> with the files of csrc that it includes in their place, each once.

    Lines keep their file and number in what the compiler says. `#include <...>` stays, for NVRTC to refuse. Raises
    ValueError when a file isn't in csrc.
    """
    seen = set()

    def expand(path: str, by: str) -> str:
        seen.add(path)
        try:
            lines = (SOURCES / path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f'{by} "{path}", but {SOURCES / path} can\'t be read: {error.strerror}') from None
        for number, line in enumerate(lines, 1):
            include = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
            if include and include[1] not in seen:
                inner = expand(include[1], f"{path}:{number} includes")
                lines[number - 1] = f'{inner}\n#line {number + 1} "{path}"'
            elif include or re.match(r"\s*#\s*pragma\s+once\b", line):
                lines[number - 1] = ""
        return "\n".join([f'#line 1 "{path}"', *lines])

    return expand(f"{family}/{header}", "asked for") + "\n"


def compile(family: str, header: str, expressions: Sequence[str], arch: str) -> tuple[Unit, bytes]:
    """csrc/<family>/<header> as a CUBIN, from the folder when it is there.

    expressions  C++ names of kernels, with namespaces: "nam56r::m2rnn::forward<nam56r::m2rnn::BFloat16, 16, 6, 16>"
    arch         such as "sm_90a"
    Returns what it is (`names` has the symbol of every expression) and the CUBIN. A file that was cut or changed is
    compiled again; a folder that can't be written is said once, and the CUBIN serves this process only.
    Raises ValueError when a source isn't there or no expression is given; RuntimeError, with the compiler's first
    errors, when it doesn't compile.
    """
    if not expressions:
        raise ValueError(f"{family}/{header}: expressions is empty, but must name a kernel")
    text, version = source(family, header), _version()
    options = (*OPTIONS, f"-arch={arch}")
    covered = json.dumps([family, header, text, options, list(expressions), version])
    key = hashlib.sha256(covered.encode()).hexdigest()
    what = tuple(re.sub(rf"\bnam56r::({re.escape(family)}::)?", "", name) for name in expressions)
    first = re.sub(r"\W+", "-", what[0]).strip("-")[:60]
    path = folder() / f"{family}-{first}-{arch}-{key[:16]}.cubin"
    kept = _kept(path, key)
    if kept:
        return kept
    began = time.perf_counter()
    names, cubin = _compile(text, f"{family}/{header}", options, expressions)
    seconds = time.perf_counter() - began
    logger.info("compiled %s %s for %s with NVRTC in %.1f s: %s", family, ", ".join(what), arch, seconds, path)
    unit = Unit(
        family=family,
        header=header,
        what=what,
        arch=arch,
        names=names,
        nvrtc=version,
        file=path.name,
        key=key,
        digest=_digest(names, cubin),
        size=len(cubin),
        seconds=seconds,
        compiled=datetime.now(UTC),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, cubin)
        _write(path.with_suffix(".json"), unit.model_dump_json(indent=2).encode())
    except OSError as error:
        _warn_once(
            f"{path.parent} can't be written ({error.strerror}): every process compiles its kernels again; "
            "set NAM56R_CACHE_DIR to a folder that can be written"
        )
    return unit, cubin


def cached() -> list[Unit]:
    """Every unit in the folder, sorted by file; what no longer has its CUBIN or can't be read is left out."""
    whole = (said for said in sorted(folder().glob("*.json")) if said.with_suffix(".cubin").is_file())
    return [unit for unit in map(_read, whole) if unit]


def _compile(
    text: str, name: str, options: tuple[str, ...], expressions: Sequence[str]
) -> tuple[dict[str, str], bytes]:
    """The symbols of the expressions, and the CUBIN."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(text, name, (), ())
    try:
        for expression in expressions:
            nvrtc.addNameExpression(program, expression)
        nvrtc.compileProgram(program, options)
        return {e: nvrtc.getLoweredName(program, e) for e in expressions}, nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).splitlines()
        errors = [line.strip() for line in log if "error:" in line][:3] or [str(error)]
        raise RuntimeError(f"csrc/{name} does not compile with {options[-1]}: {'; '.join(errors)}") from None
    finally:
        nvrtc.destroyProgram(program)


@functools.cache
def _version() -> str:
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def _digest(names: dict[str, str], cubin: bytes) -> str:
    return hashlib.sha256(json.dumps(names).encode() + cubin).hexdigest()


def _read(said: Path) -> Unit | None:
    try:
        return Unit.model_validate_json(said.read_bytes())
    except (OSError, ValidationError):
        return None


def _kept(path: Path, key: str) -> tuple[Unit, bytes] | None:
    """The unit of that key and its CUBIN, when both are there and whole."""
    unit = _read(path.with_suffix(".json"))
    if unit is None or unit.key != key:
        return None
    try:
        cubin = path.read_bytes()
    except OSError:
        return None
    return (unit, cubin) if unit.digest == _digest(unit.names, cubin) else None


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: several processes may write the same file at once."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@functools.cache
def _warn_once(line: str) -> None:
    logger.warning(line)
