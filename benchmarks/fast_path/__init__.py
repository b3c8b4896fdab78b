"""The fast path, measured beside its floors. Run with `make bench`.

`__main__` puts together what the other files measure, each a kind of figure. Servers,
floors and other clients are processes of their own.
"""
