"""Apply the gate to an evaluated model and register it where it passes."""

from typing import NamedTuple

from kfp import dsl

from medtrain.components.image import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def register_model(
    evaluation: str,
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Registered", [("model", str)]):
    """Apply the gate to an evaluated model and register it where it passes.

    Args:
        evaluation: URI that `evaluate` returned.
        metrics: The gate's metric, its bound and the verdict.

    Returns:
        `name:version` in the registry, or empty where the gate refused.
    """
    from medtrain.flow import run_registration

    result = run_registration(evaluation)
    result.show(metrics)
    return (result.model,)
