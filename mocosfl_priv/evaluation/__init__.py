"""Utility, image metrics, floors and statistics."""
