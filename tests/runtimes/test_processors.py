"""Threads follow the CPU limit of a container, which os.cpu_count() does not know."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma3_export import processors
from gemma3_export.errors import InputError
from gemma3_export.processors import available_processors, chosen_threads, processor_quota
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.support.exported_bundles import exported_bundle

V1 = "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n0::/\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    """Write files below a folder that takes the place of the root."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        pytest.param({}, None, id="no control groups"),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"},
            2.5,
            id="v2 in a container",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"},
            None,
            id="v2 without a limit",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/kube/pod/one\n",
                "sys/fs/cgroup/kube/pod/one/cpu.max": "max 100000\n",
                "sys/fs/cgroup/kube/pod/cpu.max": "300000 50000\n",
                "sys/fs/cgroup/kube/cpu.max": "800000 100000\n",
            },
            6,
            id="the smallest of v2's levels",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            1.5,
            id="v1 mounts only the container's group",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            None,
            id="v1 without a limit",
        ),
    ],
)
def test_the_quota_of_control_groups_is_found(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    assert processor_quota(machine(tmp_path, files)) == quota


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize(
    ("quota", "available", "threads"),
    [(None, 64, None), (64.0, 64, None), (4.0, 4, 4), (2.7, 2, 2), (0.5, 1, 1)],
)
def test_a_limited_process_starts_no_more_threads_than_its_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, available: int, threads: int | None
) -> None:
    monkeypatch.setattr(processors, "processor_quota", lambda: quota)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert available_processors() == available
    assert chosen_threads(None) == threads
    assert chosen_threads(7) == 7
    with pytest.raises(InputError, match="threads is 0"):
        chosen_threads(0)


@pytest.mark.skipif(sys.platform != "linux", reason="affinity masks are Linux's")
def test_onnx_runtime_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "available_processors", lambda: 1)
    monkeypatch.setattr(processors, "os", SimpleNamespace(cpu_count=lambda: 64))
    runtime = OnnxRuntime(exported_bundle("ort"), device="cpu")
    assert runtime.session.get_session_options().intra_op_num_threads == 1
    assert runtime.info.threads == 1
