"""The registry: the gate, the model package, and who is champion."""

from medtrain.registry.gate import GateVerdict
from medtrain.registry.models import (
    CANDIDATE,
    CHAMPION,
    RegisteredVersion,
    find_version,
    list_models,
    model_name,
    note,
    promote,
    pull,
)
from medtrain.registry.package import Package, verify_package, write_package
from medtrain.registry.registration import Registration, register

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "GateVerdict",
    "Package",
    "RegisteredVersion",
    "Registration",
    "find_version",
    "list_models",
    "model_name",
    "note",
    "promote",
    "pull",
    "register",
    "verify_package",
    "write_package",
]
