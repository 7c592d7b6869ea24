"""Split networks as users bring them; each file has a function ``split``."""
