"""Generated from proto/jacserve/v1 by `make proto`; never edited by hand."""
