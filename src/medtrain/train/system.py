"""What the training process uses of the machine."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

import psutil

_GB = 1024**3


class SystemMonitor:
    """Measures this process with its loader workers, and its GPU where it has one."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._last = (time.monotonic(), self._cpu_seconds())

    def snapshot(self) -> dict[str, float]:
        """Metrics `sys_…` now; CPU use is the mean since the last snapshot (100: one whole core).

        GPU memory is the device's, all processes together; its peak is this process's. Utilization
        needs the package nvidia-ml-py and is absent without it.
        """
        now, cpu_seconds = time.monotonic(), self._cpu_seconds()
        then, cpu_seconds_then = self._last
        self._last = (now, cpu_seconds)
        elapsed = max(now - then, 1e-9)
        return {
            "sys_cpu_percent": max(0.0, 100.0 * (cpu_seconds - cpu_seconds_then) / elapsed),
            "sys_memory_gb": self._memory_bytes() / _GB,
            "sys_machine_memory_percent": psutil.virtual_memory().percent,
            **_gpu(),
        }

    def _family(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]

    def _cpu_seconds(self) -> float:
        own = self._process.cpu_times()
        # Workers that have ended are in the parent's `children_…`.
        total = own.user + own.system + own.children_user + own.children_system
        for child in self._process.children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
        return float(total)

    def _memory_bytes(self) -> int:
        total = 0
        for process in self._family():
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        return total


def _gpu() -> dict[str, float]:
    # A process that has not imported torch has nothing on a GPU.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    values = {
        "sys_gpu_memory_gb": (total - free) / _GB,
        "sys_gpu_memory_percent": 100.0 * (total - free) / total,
        "sys_gpu_memory_peak_gb": torch.cuda.max_memory_allocated() / _GB,
    }
    # NVML fails in many ways (no package, no permission, a part of a GPU): then it is left out.
    with suppress(Exception):
        values["sys_gpu_percent"] = float(torch.cuda.utilization())
    return values


_monitor: SystemMonitor | None = None


def snapshot() -> dict[str, float]:
    """`SystemMonitor.snapshot` of one monitor a process; the first call measures from now on."""
    global _monitor
    if _monitor is None:
        _monitor = SystemMonitor()
    return _monitor.snapshot()
