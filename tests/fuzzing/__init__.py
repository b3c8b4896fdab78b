"""Messages that nobody should send, for the decoders and for a server that runs."""
