"""Audits of split networks as users bring them; each file runs by itself, or by `mocosfl-priv audit FILE.py:split`."""
