"""What a training process uses of the machine."""

import math
import re
from types import SimpleNamespace

from medtrain.train import system
from medtrain.train.system import SystemMonitor, snapshot


def test_snapshot_is_made_of_metrics():
    values = snapshot()
    assert {"sys_cpu_percent", "sys_memory_gb", "sys_machine_memory_percent"} <= set(values)
    assert all(re.fullmatch(r"sys_[a-z0-9_]+", name) for name in values)
    assert all(math.isfinite(value) and value >= 0 for value in values.values())
    assert 0 < values["sys_memory_gb"] < 1000


def test_cpu_use_is_measured_between_snapshots(monkeypatch):
    clock = iter([0.0, 10.0, 20.0])
    used = iter([100.0, 115.0, 115.0])
    monkeypatch.setattr(system, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(SystemMonitor, "_cpu_seconds", lambda self: next(used))
    monitor = SystemMonitor()
    assert monitor.snapshot()["sys_cpu_percent"] == 150.0
    assert monitor.snapshot()["sys_cpu_percent"] == 0.0
