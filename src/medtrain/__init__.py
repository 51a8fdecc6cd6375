"""Training platform for medical imaging: the same pipeline on a laptop and on a GPU cluster."""


def __getattr__(name: str) -> str:
    # Looked up when asked for: a worker must be able to hear a signal before it imports anything.
    if name == "__version__":
        from importlib.metadata import version

        return version("medtrain")
    raise AttributeError(f"module 'medtrain' has no attribute '{name}'")
