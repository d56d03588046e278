"""Maps kernels/ to nam56r.kernels, ships the headers of csrc/ and builds csrc/ into one stable-ABI extension,
nam56r.kernels._C.

Everything else about the package is in pyproject.toml. Without nvcc or a CUDA torch, or with NAM56R_SKIP_CUDA_BUILD=1,
the package installs without the extension. One line says which; it is kept in kernels/_build.txt for extension.py.
"""

import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

RECORD = "kernels/_build.txt"
with open("pyproject.toml", "rb") as file:
    CUDA = tomllib.load(file)["tool"]["nam56r"]["cuda"]
asked = filter(None, re.split(r"[;,\s]+", os.environ.get("NAM56R_CUDA_ARCHS", "")))
ARCHS = sorted({*CUDA["archs"], *asked}, key=lambda arch: (len(arch.rstrip("af")), arch))

# Under pip's build isolation the environment's own torch is hidden; it is the one to build against.
if importlib.util.find_spec("torch") is None:
    sys.path.append(sysconfig.get_path("purelib"))


def toolkit() -> str | None:
    """The CUDA toolkit's root: CUDA_HOME, or what the nvcc on PATH (which may be a wrapper) says of itself."""
    if "CUDA_HOME" in os.environ:
        return os.environ["CUDA_HOME"]
    if not shutil.which("nvcc"):
        return None
    said = subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"TOP=(.+)", said.stderr + said.stdout)
    return os.path.realpath(top[1].strip()) if top else None


def why_not() -> str | None:
    """Why the extension can't be built here; None when it can. Missing torch is no reason: pip brings it."""
    if os.environ.get("NAM56R_SKIP_CUDA_BUILD") == "1":
        return "NAM56R_SKIP_CUDA_BUILD=1"
    for arch in ARCHS:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SystemExit(f'NAM56R_CUDA_ARCHS has {arch!r}, but lists architectures such as "80;90a;120"')
    home = toolkit()
    if home is None:
        return "no nvcc on PATH and no CUDA_HOME"
    nvcc = os.path.join(home, "bin", "nvcc")
    if not os.path.exists(nvcc):
        return f"no nvcc in CUDA_HOME={home}"
    os.environ["CUDA_HOME"] = home
    if importlib.util.find_spec("torch"):
        import torch

        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"release (\d+)\.", said)
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
            return f"torch {torch.__version__} is older than 2.11, whose stable ABI the sources use"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        if version and version[1] != torch.version.cuda.split(".")[0]:
            return f"nvcc is CUDA {version[1]}, but torch {torch.__version__} is built with {torch.version.cuda}"
    return None


def extension():
    from torch.utils.cpp_extension import CUDAExtension

    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    return CUDAExtension(
        "nam56r.kernels._C",
        sources=sorted(f for end in ("cpp", "cu") for f in glob.glob(f"csrc/**/*.{end}", recursive=True)),
        depends=[f for end in ("h", "cuh") for f in glob.glob(f"csrc/**/*.{end}", recursive=True)],
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[("NAM56R_ARCHS", f'"{" ".join(ARCHS)}"')],
        extra_compile_args={"cxx": CUDA["flags"], "nvcc": [*CUDA["flags"], *gencode]},
        py_limited_api=True,
    )


reason = why_not()
has_torch = importlib.util.find_spec("torch") is not None
if reason is None and has_torch:
    from torch.utils.cpp_extension import BuildExtension as build_ext


def record():
    """Say what is built, and keep it for extension.py. An extension that is there already stays, with its record."""
    line = f"not built: {reason}" if reason else f"built for {', '.join(f'sm_{arch}' for arch in ARCHS)}"
    stays = reason and glob.glob("kernels/_C.*so")
    print(f"nam56r: CUDA extension {line}{'; the one that is there stays' if stays else ''}", file=sys.stderr)
    if not stays:
        with open(RECORD, "w", encoding="utf-8") as file:
            file.write(line + "\n")


class BuildPy(build_py):
    """Leaves the record before the package's files are gathered."""

    def run(self):
        record()
        super().run()


class BuildExt(build_ext):
    def run(self):
        super().run()
        record()


kernels = ["nam56r.kernels", *(f"nam56r.kernels.{p}" for p in find_packages("kernels"))]
setup(
    packages=[*find_packages(include=["nam56r", "nam56r.*"]), *kernels, "nam56r.csrc"],
    package_dir={"nam56r.kernels": "kernels", "nam56r.csrc": "csrc"},
    package_data={"nam56r.kernels": ["_build.txt"], "nam56r.csrc": ["**/*.cuh"]},  # nvrtc.py compiles the .cuh
    include_package_data=False,  # not all that MANIFEST.in puts into the source distribution
    ext_modules=[extension()] if reason is None and has_torch else [],
    setup_requires=["torch>=2.11"] if reason is None and not has_torch else [],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp312"}} if reason is None else {},
)
