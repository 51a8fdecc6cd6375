"""The doctor's rules for cephalometric landmarks."""

from __future__ import annotations

from medtrain.recipes.recipe import Rule

RULES: tuple[Rule, ...] = ()
