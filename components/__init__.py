"""The verbs that Kubeflow Pipelines knows: a signature and one call each."""
