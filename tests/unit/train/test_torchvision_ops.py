from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap

import pytest
import torch

from medtrain.train import torchvision_ops


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_timm_builds_a_network_after_the_guard():
    out = _run("""
        from medtrain.train.torchvision_ops import ensure_torchvision
        works = ensure_torchvision()
        import timm, torch, torchvision
        assert ensure_torchvision() is works is torchvision.extension._has_ops()
        with torch.device("meta"):
            net = timm.create_model("resnet18", features_only=True).eval()
            print(len(net(torch.zeros(1, 3, 32, 32))))
    """)
    assert out.strip() == "5"


def test_a_torchvision_whose_operators_are_undeclared_is_imported_at_the_second_try(monkeypatch):
    torchvision_ops.ensure_torchvision.cache_clear()
    imported: list[str] = []
    declared: list[str] = []

    class Extension:
        @staticmethod
        def _has_ops() -> bool:
            return False

    class Library:
        def __init__(self, name: str, kind: str) -> None:
            assert (name, kind) == ("torchvision", "DEF")

        def define(self, schema: str) -> None:
            declared.append(schema.split("(")[0])

    def import_module(name: str) -> type:
        imported.append(name)
        if name == "torchvision" and not declared:
            raise RuntimeError("operator torchvision::nms does not exist")
        return Extension

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(torchvision_ops, "_forget", lambda package: None)
    assert torchvision_ops.ensure_torchvision() is False
    assert imported == ["torchvision", "torchvision", "torchvision.extension"]
    assert declared == ["nms", "qnms"]
    torchvision_ops.ensure_torchvision.cache_clear()


def test_another_failure_of_the_import_is_not_hidden(monkeypatch):
    torchvision_ops.ensure_torchvision.cache_clear()

    def import_module(name: str) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(RuntimeError, match="out of memory"):
        torchvision_ops.ensure_torchvision()
    torchvision_ops.ensure_torchvision.cache_clear()


def test_a_half_imported_package_is_forgotten_with_its_modules(monkeypatch):
    for name in ("vision", "vision.ops", "visionary"):
        monkeypatch.setitem(sys.modules, name, object())
    torchvision_ops._forget("vision")
    assert {name for name in sys.modules if name.startswith("vision")} == {"visionary"}
