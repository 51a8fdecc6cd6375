"""Write the report that a person reads."""

from typing import NamedTuple

from kfp import dsl

from medtrain.components.image import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def summarize(
    evaluation: str,
    model: str,
    page: dsl.Output[dsl.HTML],
) -> NamedTuple("Summarized", [("report", str)]):
    """Write the report of an evaluation and of the stages that led to it.

    Args:
        evaluation: URI that `evaluate` returned.
        model: What `register_model` returned; the report tells the gate's verdict.
        page: The report, shown by the pipeline's user interface.

    Returns:
        URI of the report.
    """
    from medtrain.flow import run_report

    return (run_report(evaluation, copy_to=page.path),)
