"""Runs functions in a worker process, which is ended when one of them does not end."""
