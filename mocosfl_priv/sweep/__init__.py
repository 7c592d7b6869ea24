"""Sweeps: many experiments whose shared parts are computed once, in parallel, and stored for later sweeps."""
