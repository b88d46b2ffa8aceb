"""What pip installed for ONNX Runtime and CUDA, read from metadata and files without an import."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from gemma3_export.cuda.facts import Packages

__all__ = [
    "BOTH_INSTALLED",
    "CPU_PACKAGE",
    "CUDA_EXTRA",
    "GPU_PACKAGE",
    "PROVIDER",
    "REINSTALL",
    "is_installed",
    "read_packages",
]

CPU_PACKAGE, GPU_PACKAGE = "onnxruntime", "onnxruntime-gpu"
CUDA_EXTRA = 'pip install "gemma3-export[cuda]"'
REINSTALL = f"pip uninstall -y onnxruntime onnxruntime-gpu && {CUDA_EXTRA}"
BOTH_INSTALLED = "onnxruntime and onnxruntime-gpu are both installed and the former hides CUDA"
PROVIDER = "libonnxruntime_providers_cuda.so"
SHOWN = re.compile(r"gemma3-export|onnxruntime.*|ort-nightly.*|torch|nvidia-.*")


def is_installed(distribution: str) -> bool:
    """Whether pip knows ``distribution``."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def read_packages() -> Packages:
    """What is installed; what is damaged counts as absent."""
    folder = package_folder("onnxruntime")
    build = {} if folder is None else assignments(folder / "capi" / "build_and_package_info.py")
    provider = None if folder is None else folder / "capi" / PROVIDER
    torch = package_folder("torch")
    return Packages(
        versions=dict(sorted(shown_versions())),
        build=build.get("package_name"),
        build_version=build.get("__version__"),
        cuda_version=build.get("cuda_version"),
        provider=str(provider) if provider is not None and provider.is_file() else None,
        torch_cuda=None if torch is None else assignments(torch / "version.py").get("cuda"),
    )


def shown_versions() -> Iterator[tuple[str, str]]:
    """Distribution and version of all that has to do with CUDA."""
    for distribution in importlib.metadata.distributions():
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:  # noqa: S112  (damaged by a full disk, for example: counts as absent)
            continue
        if name and version and SHOWN.fullmatch(name.lower()):
            yield name.lower().replace("_", "-"), version


def package_folder(module: str) -> Path | None:
    """Where a package lies; it is not imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def assignments(file: Path) -> dict[str, str]:
    """Texts that a small module assigns to names: ``cuda_version = '13.0'``."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    return dict(re.findall(r"^(\w+)\s*(?::[^=\n]+)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE))
