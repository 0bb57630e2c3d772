"""OPTIMIZATION_LOG.md: the template, one entry per run, and the recommendation."""
