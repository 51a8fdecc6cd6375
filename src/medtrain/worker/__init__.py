"""The pods' door: `python -m medtrain.worker`."""
