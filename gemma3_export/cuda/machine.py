"""Python, the system, and the traces of NVIDIA hardware that need no driver."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

from gemma3_export.cuda.facts import Machine

__all__ = ["read_machine"]

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
)
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA_VENDOR = "0x10de"
WSL_DEVICE = Path("/dev/dxg")  # a GPU that Windows passes on, which is on no bus
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")


def read_machine() -> Machine:
    """What the machine is, as far as it tells."""
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        system=platform.system(),
        processor=platform.machine(),
        is_container=any(Path(mark).exists() for mark in CONTAINER_MARKS),
        nvidia_devices=count_nvidia_devices(),
        kernel_driver=kernel_driver_version(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def count_nvidia_devices() -> int | None:
    """NVIDIA's devices on the PCI bus; None where the bus cannot be seen."""
    if WSL_DEVICE.exists() or not PCI_DEVICES.is_dir():
        return None
    try:
        vendors = [file.read_text(encoding="ascii") for file in PCI_DEVICES.glob("*/vendor")]
    except (OSError, UnicodeDecodeError):
        return None
    return sum(vendor.strip() == NVIDIA_VENDOR for vendor in vendors) if vendors else None


def kernel_driver_version() -> str | None:
    """Version of the NVIDIA kernel module that is loaded."""
    try:
        text = KERNEL_DRIVER.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else "unknown"
