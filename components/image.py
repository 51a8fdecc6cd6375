"""Names of the two images where a pipeline does not say otherwise."""

PLATFORM_IMAGE = "medtrain/platform:latest"
"""Launches and follows jobs; holds no torch."""
TRAINER_IMAGE = "medtrain/trainer:latest"
"""Trains and judges."""
