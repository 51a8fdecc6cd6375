"""The smallest possible system: six numbers predict one. For tests, with this folder on PYTHONPATH.

It joins the list of systems as any package of a user's would, by its entry point.
"""
