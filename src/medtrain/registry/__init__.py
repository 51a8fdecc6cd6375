"""The registry: the gate, the model package, and who is champion."""

from medtrain.registry.gate import GateVerdict
from medtrain.registry.models import (
    CANDIDATE,
    CHAMPION,
    RegisteredVersion,
    Registration,
    find_version,
    list_models,
    model_name,
    note,
    promote,
    pull,
    register,
)
from medtrain.registry.package import Package, verify_package, write_package

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
