"""How many processors this process may use, and how many threads that makes.

A container that is limited to one CPU of a large machine still sees all of its processors: the
limit is a quota of time, which Linux keeps in control groups. ONNX Runtime and PyTorch would start
a thread per core, and all of them would share the quota.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from gemma3_export.limits import check_threads

__all__ = ["available_processors", "chosen_threads", "processor_quota"]

ROOT = Path("/")
V1_MOUNTS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")


def chosen_threads(threads: Any) -> int | None:
    """Return how many threads a backend should start.

    Args:
        threads: the number that was asked for, or None.

    Returns:
        ``threads``; without it, one per available processor if a quota or an affinity mask keeps
        this process from some of them, otherwise None, which lets the backend choose.

    Raises:
        InputError: ``threads`` is not a sensible number of threads.
    """
    if check_threads(threads) is not None:
        return int(threads)
    available = available_processors()
    return available if available < (os.cpu_count() or 1) else None


def available_processors() -> int:
    """Return the number of logical processors that this process may use.

    A quota of 2.5 processors counts as 2: a third thread would hold the others up whenever the
    quota is spent.
    """
    if sys.platform == "linux":
        count, quota = len(os.sched_getaffinity(0)), processor_quota()
        return count if quota is None else max(1, min(count, int(quota)))
    return os.cpu_count() or 1


def processor_quota(root: Path = ROOT) -> float | None:
    """Return the processors whose time the control groups of this process allow.

    Args:
        root: the folder that contains ``proc`` and ``sys``.

    Returns:
        The smallest quota of its group and the groups above; None without a limit.
    """
    quotas = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        # In a container, the group's name may be that outside, while only its own is mounted.
        places = [group.lstrip("/")]
        while places[-1]:
            places.append(places[-1].rpartition("/")[0])
        for place in places:
            if not controllers:
                quotas.append(_v2_quota(root / "sys/fs/cgroup" / place))
            elif "cpu" in controllers.split(","):
                for mount in V1_MOUNTS:
                    quotas.append(_v1_quota(root / "sys/fs/cgroup" / mount / place))
    return min((quota for quota in quotas if quota is not None), default=None)


def _v2_quota(group: Path) -> float | None:
    words = (_read(group / "cpu.max") or "max").split()
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _v1_quota(group: Path) -> float | None:
    return _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _ratio(quota_us: str | None, period_us: str | None) -> float | None:
    """Return a quota in processors; None for ``max``, -1 and what is missing."""
    try:
        quota, period = int(quota_us or ""), int(period_us or "")
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
