"""Training platform for medical imaging: the same pipeline on a laptop and on a GPU cluster."""

from importlib.metadata import version

__version__ = version("medtrain")
