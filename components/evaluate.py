"""Judge a trained stage on the sealed test split."""

from typing import NamedTuple

from kfp import dsl

from medtrain.components.image import PLATFORM_IMAGE


@dsl.component(base_image=PLATFORM_IMAGE, install_kfp_package=False)
def evaluate(
    run: str,
    data: str,
    metrics: dsl.Output[dsl.Metrics],
    again: int = 0,
) -> NamedTuple("Evaluated", [("evaluation", str)]):
    """Judge a trained stage on the sealed test split; the look is recorded and counted.

    Args:
        run: URI that `train_stage` returned.
        data: URI that `prepare_data` returned.
        metrics: Metrics on the sealed test split.
        again: 0, or the number of a deliberate repetition.

    Returns:
        URI of the evaluation's run.
    """
    from medtrain.flow import run_evaluation

    result = run_evaluation(run, data_uri=data, again=again)
    result.show(metrics)
    return (result.uri,)
