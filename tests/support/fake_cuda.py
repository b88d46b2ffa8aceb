"""Fake packages, CUDA libraries and an NVIDIA driver for the doctor to find.

Libraries are compiled, so that the loader really loads or rejects them. Packages are folders that
come first on the path of the processes that the doctor starts.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

GPU_VERSION = "1.31.1"
DRIVER = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return ERROR; }
int cuDriverGetVersion(int *out) { return *out = VERSION, 0; }
int cuDeviceGetCount(int *out) { return *out = COUNT, 0; }
int cuDeviceGet(int *out, int index) { return *out = index, 0; }
int cuDeviceGetName(char *out, int size, int device) { return strcpy(out, "Fake GPU"), 0; }
int cuDeviceGetAttribute(int *out, int what) { return *out = what == 75 ? MAJOR : 6, 0; }
int cuDeviceTotalMem_v2(size_t *out, int device) { return *out = 24000000000, 0; }
"""
# The part of ONNX Runtime that is needed to run one session.
MODULE = f"""
__version__ = "{GPU_VERSION}"
VALUES = {{values}}
def get_available_providers(): return ["CUDAExecutionProvider", "CPUExecutionProvider"]
def preload_dlls(): pass
def set_default_logger_severity(severity): pass
class SessionOptions:
    def add_session_config_entry(self, key, value): pass
class InferenceSession:
    def __init__(self, source, options, providers):
        self.providers = [p if isinstance(p, str) else p[0] for p in providers]
    def get_providers(self): return self.providers
    def run(self, names, inputs): return [inputs["left"] @ inputs["right"] + VALUES]
"""


class FakeCuda:
    """A folder of fakes, empty until a test adds them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packages, self.system = folder / "packages", folder / "system"
        self.packages.mkdir()
        self.system.mkdir()
        paths = (str(self.packages), os.environ.get("PYTHONPATH"))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        monkeypatch.setenv("LD_LIBRARY_PATH", str(self.system))
        monkeypatch.setattr(sys, "path", [str(self.packages), *sys.path])
        for name in ("onnxruntime", "torch", "nvidia"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    def distribution(self, name: str, version: str) -> None:
        """Write the metadata of a package."""
        folder = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(text, encoding="utf-8")

    def module(self, name: str, code: str) -> Path:
        """Write the code of a package; return its folder."""
        folder = self.packages / name
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text(code, encoding="utf-8")
        return folder

    def onnxruntime_gpu(self, *needed: str, wrong_by: int = 0) -> None:
        """Write onnxruntime-gpu with a CUDA provider that links to ``needed``."""
        self.distribution("onnxruntime-gpu", GPU_VERSION)
        capi = self.module("onnxruntime", MODULE.format(values=wrong_by)) / "capi"
        capi.mkdir()
        (capi / "build_and_package_info.py").write_text(
            f"package_name = 'onnxruntime-gpu'\n__version__ = '{GPU_VERSION}'\n"
            "cuda_version = '13.0'\n",
            encoding="utf-8",
        )
        built = capi.parent.parent.parent / "built"
        built.mkdir()
        for name in needed:
            compile_library(built / name, "int unused;")
        compile_library(
            capi / "libonnxruntime_providers_cuda.so",
            "int unused;",
            f"-L{built}",
            "-Wl,--no-as-needed",
            *(f"-l:{name}" for name in needed),
        )

    def wheel(self, name: str, version: str, *libraries: str) -> None:
        """Write one of NVIDIA's packages with its libraries."""
        self.distribution(name, version)
        folder = self.packages / "nvidia" / "cu13" / "lib"
        folder.mkdir(parents=True, exist_ok=True)
        for library in libraries:
            compile_library(folder / library, "int unused;")

    def driver(
        self, *, version: int = 13000, count: int = 1, error: int = 0, major: int = 8
    ) -> None:
        """Compile ``libcuda.so.1``."""
        values = {"VERSION": version, "COUNT": count, "ERROR": error, "MAJOR": major}
        defined = [f"-D{name}={value}" for name, value in values.items()]
        compile_library(self.system / "libcuda.so.1", DRIVER, *defined)


def compile_library(path: Path, code: str, *arguments: str) -> None:
    """Compile a shared library, or skip the test if there is no compiler."""
    path.write_bytes(compiled(path.name, code, *arguments))


@functools.cache
def compiled(name: str, code: str, *arguments: str) -> bytes:
    """Return the shared library ``name``; tests compile the same few again and again."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build fake libraries")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        command = [compiler, "-x", "c", "-", "-x", "none", "-shared", "-fPIC", "-w", "-o", path]
        named = [f"-Wl,-soname,{name}"]
        subprocess.run([*command, *named, *arguments], input=code, text=True, check=True)
        return path.read_bytes()
