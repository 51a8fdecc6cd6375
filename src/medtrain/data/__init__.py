"""Data sets: manifests, splits, per-case results, caches, loaders and transforms."""
