"""Sweeps: many experiments at once, whose parts are computed once, in parallel, and kept."""
