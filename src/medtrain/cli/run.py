"""`medtrain run`, `evaluate` and `compile`: one stage, or a whole pipeline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from medtrain.errors import ConfigError

Name = Annotated[str, typer.Argument(help="SYSTEM/VARIANT:STAGE+OVERLAY", metavar="NAME")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Assignments; for a whole pipeline STAGE:KEY=VALUE concerns one stage alone.",
        metavar="[KEY=VALUE]…",
    ),
]


def run(
    name: Name,
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of values, such as a run's config.yaml.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="Run of prepare to use; default: prepare data.root now.")
    ] = "",
    parent: Annotated[
        str, typer.Option(help="Run to start from; default: the recipe's earlier stage.")
    ] = "",
    again: Annotated[bool, typer.Option(help="Run anew, whatever was finished before.")] = False,
    again_number: Annotated[
        int, typer.Option(help="Go on with the repetition of this number.", min=0)
    ] = 0,
    retry: Annotated[
        bool, typer.Option(help="Take back a run's verdict and go on from its checkpoint.")
    ] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="Run in spite of this rule of the doctor.")
    ] = None,
) -> None:
    """Run a stage, or without a stage the whole pipeline. What is finished is not run twice.

    [bold]Examples[/bold]

      medtrain run cephalometric data.root=/data/isbi2015

      medtrain run cephalometric:transformer data.root=/data/isbi2015 epochs=20

      medtrain run cephalometric/small data.root=s3://bucket/isbi baseline:epochs=10
    """
    from medtrain.recipes import find
    from medtrain.settings import settings

    recipe_name, recipe = find(name)
    typer.echo(f"local state: {settings().home.absolute()}")
    if again:
        again_number = int(time.time())
        typer.echo(f"repetition {again_number}: go on with it by --again-number {again_number}")
    values = list(overrides or [])
    if config is not None:
        from medtrain.overrides import file_as_assignments

        values = [*file_as_assignments(config, stage_type=recipe.stage_type), *values]
    # An overlay is a list of assignments: a pipeline and earlier stages take them as such.
    overlaid = [text for overlay in recipe_name.overlays for text in recipe.overlays[overlay]]
    if recipe_name.stage is None:
        given = [
            option
            for option, value in {"--data": data, "--parent": parent, "--retry": retry}.items()
            if value
        ]
        if given:
            raise ConfigError(f"{', '.join(given)} needs a stage: name it, such as {name}:baseline")
        _run_pipeline(
            recipe_name.system,
            variant=recipe_name.variant,
            overrides=[*overlaid, *values],
            allow=allow or [],
            again=again_number,
        )
        return
    _run_chain(
        name,
        values,
        overlaid=overlaid,
        data_uri=data,
        parent_uri=parent,
        again=again_number,
        retry=retry,
        allow=allow or [],
    )


def evaluate(
    run: Annotated[str, typer.Argument(help="Run directory of a trained stage.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="data.… of another data set to judge on; default: the run's own.",
            metavar="[KEY=VALUE]…",
        ),
    ] = None,
) -> None:
    """Judge a trained stage on the sealed test split of its data, or on an external data set.

    Every look at a sealed test is recorded and counted.

    [bold]Examples[/bold]

      medtrain evaluate medtrain-local/storage/runs/cephalometric/default/multitask/KEY

      medtrain evaluate RUN data.root=/data/other_hospital data.protocol=external
    """
    from medtrain.flow import prepare_cases, run_evaluation, run_report, say
    from medtrain.storage.runs import RunDirectory

    trained = RunDirectory.open(run)
    facts = trained.read_json("facts.json")
    if facts is None:
        raise ConfigError(f"{run} must be the run directory of a trained stage, but is none")
    data_uri = facts["data_uri"]
    foreign = [text for text in overrides or [] if not text.startswith("data.")]
    if foreign:
        raise ConfigError(
            f"only data.… may be given to choose another data set, but not {', '.join(foreign)}: "
            "the model's own values stand in its run"
        )
    if overrides:
        data_uri = prepare_cases(facts["name"].partition(":")[0], overrides).uri
    result = run_evaluation(trained.uri, data_uri=data_uri)
    for metric, value in sorted(result.outcome.metrics.items()):
        say(f"{metric}={value:.6g}")
    run_report(result.uri)


def _run_pipeline(
    system: str, *, variant: str, overrides: list[str], allow: list[str], again: int
) -> None:
    from medtrain.flow import check_stages
    from medtrain.pipelines import find_pipeline
    from medtrain.pipelines.local import run_locally

    check_stages(f"{system}/{variant}", overrides, allow=allow)
    run_locally(
        find_pipeline(system),
        {"variant": variant, "overrides": overrides, "allow": allow, "again": again},
    )


def _run_chain(
    name: str,
    overrides: list[str],
    *,
    overlaid: list[str],
    data_uri: str,
    parent_uri: str,
    again: int,
    retry: bool,
    allow: list[str],
) -> None:
    """Run the stages before the named one where they are not finished, then it."""
    from medtrain.flow import prepare_cases, run_stage, say
    from medtrain.overrides import for_stage
    from medtrain.recipes import chain, find, resolve

    recipe_name, recipe = find(name)
    stages = tuple(recipe.stages(recipe_name.variant))
    for text in overrides:
        if not for_stage([text], recipe_name.stage or "", stages=stages):
            raise ConfigError(f"'{text}' is for another stage than {recipe_name.stage}")
    resolution = resolve(recipe_name, for_stage(overrides, recipe_name.stage or "", stages=stages))
    system = f"{recipe_name.system}/{recipe_name.variant}"
    *earlier, stage = chain(recipe_name)
    # An earlier stage is the recipe's own, on the same data: other values are the named stage's.
    shared = [
        text
        for text in [*overlaid, *overrides]
        if text.startswith(("data.", "job.")) and not text.startswith("data.augmentation.")
    ]
    data_uri = data_uri or prepare_cases(system, shared).uri
    for earlier_stage in [] if parent_uri else earlier:
        say(f"{system}:{earlier_stage} comes first")
        result = run_stage(
            f"{system}:{earlier_stage}",
            shared,
            data_uri=data_uri,
            parent_uri=parent_uri,
            allow=allow,
        )
        parent_uri = result.uri
    result = run_stage(
        name,
        overrides,
        data_uri=data_uri,
        parent_uri=parent_uri,
        again=again,
        allow=allow,
        is_retry=retry,
    )
    for kept, criterion in resolution.stage.checkpoint.criteria.items():
        value = result.outcome.metrics.get(criterion.metric)
        if value is not None:
            say(f"{criterion.metric}={value:.6g} ({kept})")
    say(f"{system}:{stage} is done: {result.uri}")
    say(f"Now: medtrain report {result.uri}")
    say(f"     medtrain evaluate {result.uri}    (a look at the sealed test, counted)")


def compile_pipeline(
    name: Annotated[str, typer.Argument(help="SYSTEM, or a component such as train_stage.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="YAML file to write.")],
) -> None:
    """Write a pipeline, or one component for other people's pipelines, as YAML for Kubeflow.

    [bold]Examples[/bold]

      medtrain compile cephalometric -o cephalometric.yaml

      medtrain compile train_stage -o train_stage.yaml
    """
    from medtrain.pipelines import compile_to

    compile_to(name, output)
    typer.echo(f"wrote {output}")
