"""Backbones as lists of units, models split at a cut layer, bottlenecks and projectors."""
