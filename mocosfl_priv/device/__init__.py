"""The device side: what a client costs. Nothing in this package imports torch."""
