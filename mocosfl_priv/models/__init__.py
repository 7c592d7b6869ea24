"""Backbones split at a cut layer, bottlenecks, and inversion decoders."""
