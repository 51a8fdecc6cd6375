"""The model package, as training writes it and serving reads it; its format is the registry's."""

from medtrain.registry.package import Package, verify_package, write_package

__all__ = ["Package", "verify_package", "write_package"]
