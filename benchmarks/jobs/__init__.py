"""Batch jobs, measured beside loops in one process. Run with `make bench-jobs`.

`__main__` puts together what the other files measure. Servers, loops and clients whose
memory counts are processes of their own; statistics, tables and processes are those of
the fast path.
"""
