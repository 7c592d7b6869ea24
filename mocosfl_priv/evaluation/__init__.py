"""Utility, image metrics, recognition, floors, statistics and reliability flags."""
