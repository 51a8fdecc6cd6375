"""Where metrics go: the run's own files first, then console, TensorBoard, MLflow and W&B.

Only rank 0 has a tracker. Nothing here imports torch before a TensorBoard is wanted.
"""

from medtrain.train.tracking.build import RunLabels, build_tracker
from medtrain.train.tracking.tracker import CompositeTracker, EndState, Tracker

__all__ = ["CompositeTracker", "EndState", "RunLabels", "Tracker", "build_tracker"]
