"""One description of a job, and the places where it can run."""
