"""Train one stage of a recipe as a job of its own."""

from typing import List, NamedTuple

from kfp import dsl

from medtrain.components.image import PLATFORM_IMAGE


@dsl.component(base_image=PLATFORM_IMAGE, install_kfp_package=False)
def train_stage(
    recipe: str,
    variant: str,
    stage: str,
    data: str,
    metrics: dsl.Output[dsl.Metrics],
    model: dsl.Output[dsl.Model],
    parent: str = "",
    overrides: List[str] = [],
    allow: List[str] = [],
    again: int = 0,
) -> NamedTuple("Trained", [("run", str)]):
    """Train one stage of a recipe as a job of its own; a finished stage answers at once.

    Args:
        recipe: System, such as `cephalometric`.
        variant: Variant of the recipe.
        stage: Stage, such as `baseline`.
        data: URI that `prepare_data` returned.
        metrics: Best validation metrics.
        model: URI of the best checkpoint.
        parent: URI of the run that this stage starts from, where it starts from one.
        overrides: Assignments `key=value`, or `STAGE:key=value` for one stage alone.
        allow: Rules of the doctor in spite of which to run.
        again: 0, or the number of a deliberate repetition.

    Returns:
        URI of the run.
    """
    from medtrain.flow import run_stage

    result = run_stage(
        f"{recipe}/{variant}:{stage}",
        overrides,
        data_uri=data,
        parent_uri=parent,
        allow=allow,
        again=again,
    )
    result.show(metrics)
    model.uri = result.artifact_uri("model")
    return (result.uri,)
