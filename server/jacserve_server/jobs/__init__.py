"""Batch jobs: queries about more points than one call carries."""
