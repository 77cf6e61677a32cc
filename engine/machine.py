"""What this machine is: cores, CPU, memory. Linux tells; elsewhere the answers are coarser."""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")


def n_physical_cores() -> int:
    """Return the physical cores this process may use: its CPU affinity and its container's quota count."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = {_read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in allowed}
    return min(len(cores), _quota())


def _quota() -> int:
    """Return the CPUs that the container allows, rounded up; more than there are if it sets no limit."""
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    if quota.isdigit() and period.isdigit():
        return max(1, math.ceil(int(quota) / int(period)))
    return sys.maxsize


def n_logical_cpus() -> int:
    """Return the CPUs this process may use, all threads of its cores counted: affinity and quota limit them."""
    n_allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(n_allowed, _quota())


def cpu_name() -> str:
    """Return the CPU's name for people."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def ram_bytes() -> int:
    """Return the size of the memory, 0 if it is not known."""
    return _kilobytes(Path("/proc/meminfo"), "MemTotal")


def available_memory() -> int | None:
    """Return the bytes of RAM free for us in the system and in our control group (a container); None if unknown."""
    found = [n for n in (_kilobytes(Path("/proc/meminfo"), "MemAvailable") or None, _left_of_limit()) if n is not None]
    return min(found, default=None)


def _left_of_limit() -> int | None:
    """Return what is left of the limit of a container (control groups version 2); file cache counts as free."""
    try:
        group = next(line[3:] for line in _read(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::"))
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        limit, used = int(_read(folder / "memory.max")), int(_read(folder / "memory.current"))
        stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
        return max(0, limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    except (StopIteration, ValueError, KeyError):  # another version, not mounted, or "max": no limit that we can see
        return None


def resident_bytes() -> int:
    """Return the memory this process holds at the moment, mapped file pages included; 0 if it is not known."""
    return _kilobytes(Path("/proc/self/status"), "VmRSS")


def last_level_cache_bytes() -> int:
    """Return the size of the largest cache of one core, 0 if it is not known."""
    sizes = [_read(path) for path in (_CPUS / "cpu0" / "cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def _kilobytes(path: Path, key: str) -> int:
    match = re.search(rf"^{key}:\s*(\d+) kB$", _read(path), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # not Linux, or hidden from this container: the caller has a coarser answer
        return ""
