"""What the machine says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.machine import available_memory


def test_free_memory_is_known_and_plausible() -> None:
    free = available_memory()
    assert free is not None
    assert 1 << 20 < free < 1 << 50


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max", None), ("1000", 1000 - 600 + 100 + 50), ("10", 0)],
)
def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, limit: str, expected: int | None) -> None:
    files = {
        "/proc/self/cgroup": "0::/a/b\n",
        "/sys/fs/cgroup/a/b/memory.max": limit + "\n",
        "/sys/fs/cgroup/a/b/memory.current": "600\n",
        "/sys/fs/cgroup/a/b/memory.stat": "anon 450\ninactive_file 100\nactive_file 50\n",
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path, **_: files[str(path)])
    if limit == "10":
        files["/sys/fs/cgroup/a/b/memory.current"] = "900\n"
    assert available_memory() == (5000 * 1024 if expected is None else expected)
