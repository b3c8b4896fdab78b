"""A server under everything at once, for minutes: `make soak`."""
