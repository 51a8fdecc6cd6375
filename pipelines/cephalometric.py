"""Cephalometric landmarks: three stages, each from the one before, judged and registered."""

from typing import List, NamedTuple

from kfp import dsl

from medtrain.components.evaluate import evaluate
from medtrain.components.image import PLATFORM_IMAGE, TRAINER_IMAGE
from medtrain.components.prepare_data import prepare_data
from medtrain.components.register_model import register_model
from medtrain.components.summarize import summarize
from medtrain.components.train_stage import train_stage
from medtrain.pipelines.site import place


class Results(NamedTuple):
    """What the pipeline answers."""

    model: str
    report: str


@dsl.pipeline(name="cephalometric", description="Prepare, three stages, evaluate, gate, register")
def cephalometric(
    variant: str = "default",
    overrides: List[str] = [],
    allow: List[str] = [],
    again: int = 0,
    platform_image: str = PLATFORM_IMAGE,
    trainer_image: str = TRAINER_IMAGE,
    site_config_map: str = "medtrain-site",
    site_secret: str = "medtrain-credentials",
) -> Results:
    """Train, judge and register MAHT-Net.

    Args:
        variant: Variant of the recipe, such as `default` or `smoke`.
        overrides: Assignments `key=value` for every stage, `STAGE:key=value` for one.
        allow: Rules of the doctor in spite of which to run.
        again: 0, or the number of a deliberate repetition.
        platform_image: Image that launches and follows jobs.
        trainer_image: Image that trains, judges and registers.
        site_config_map: ConfigMap with the site's settings.
        site_secret: Secret with the site's credentials.

    Returns:
        `model` is `name:version` in the registry, or empty where the gate refused; `report` is
        the URI of the page.
    """
    recipe = "cephalometric"
    site = {"config_map": site_config_map, "secret": site_secret}

    prepared = prepare_data(
        recipe=recipe, variant=variant, overrides=overrides, allow=allow, again=again
    )
    place(prepared, name="prepare", image=platform_image, **site)
    data = prepared.outputs["data"]

    parent = ""
    for stage in ("baseline", "transformer", "multitask"):
        trained = train_stage(
            recipe=recipe,
            variant=variant,
            stage=stage,
            data=data,
            parent=parent,
            overrides=overrides,
            allow=allow,
            again=again,
        )
        place(trained, name=stage, image=platform_image, **site)
        parent = trained.outputs["run"]

    judged = evaluate(run=parent, data=data, again=again)
    place(judged, name="evaluate", image=platform_image, **site)
    registered = register_model(evaluation=judged.outputs["evaluation"])
    place(registered, name="gate and register", image=trainer_image, **site)
    summarized = summarize(
        evaluation=judged.outputs["evaluation"], model=registered.outputs["model"]
    )
    place(summarized, name="report", image=trainer_image, **site)
    return Results(
        model=registered.outputs["model"],
        report=summarized.outputs["report"],
    )
