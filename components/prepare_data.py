"""Check the raw data and record who is in which split."""

from typing import List, NamedTuple

from kfp import dsl

from medtrain.components.image import PLATFORM_IMAGE


@dsl.component(base_image=PLATFORM_IMAGE, install_kfp_package=False)
def prepare_data(
    recipe: str,
    variant: str,
    metrics: dsl.Output[dsl.Metrics],
    overrides: List[str] = [],
    allow: List[str] = [],
    again: int = 0,
) -> NamedTuple("Prepared", [("data", str)]):
    """Check the raw data and record who is in which split.

    Args:
        recipe: System, such as `cephalometric`.
        variant: Variant of the recipe.
        metrics: Number of cases in every role.
        overrides: Assignments `key=value`; `data.root=URI` names the raw data.
        allow: Rules of the doctor in spite of which to run.
        again: 0, or the number of a deliberate repetition.

    Returns:
        URI of the run that holds manifest and splits.
    """
    from medtrain.flow import run_prepare

    result = run_prepare(f"{recipe}/{variant}", overrides, allow=allow, again=again)
    result.show(metrics)
    return (result.uri,)
