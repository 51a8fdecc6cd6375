"""What a site gives to every step: images, configuration and credentials, all by parameter."""

from kfp import dsl, kubernetes

SITE_KEYS = (
    "MEDTRAIN_STORAGE_ROOT",
    "MEDTRAIN_TRACKING_URI",
    "MEDTRAIN_EXPERIMENT",
    "MEDTRAIN_WEIGHTS_ROOT",
)
"""Keys of the site's ConfigMap, which become environment variables of the same name."""
SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN")
"""Keys of the site's Secret, which become environment variables of the same name."""


def place(
    task: dsl.PipelineTask, *, name: str, image: str, config_map: str, secret: str
) -> dsl.PipelineTask:
    """Give a step its name in the user interface, its image and the site's environment."""
    task.set_display_name(name)
    task.set_container_image(image)
    # A finished run answers at once by its run key: that is the only cache.
    task.set_caching_options(False)
    kubernetes.use_config_map_as_env(
        task,
        config_map_name=config_map,
        config_map_key_to_env={key: key for key in SITE_KEYS},
        optional=True,
    )
    kubernetes.use_secret_as_env(
        task, secret_name=secret, secret_key_to_env={key: key for key in SECRET_KEYS}, optional=True
    )
    return task
