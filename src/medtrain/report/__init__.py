"""Pages and figures that a person reads after a run."""
