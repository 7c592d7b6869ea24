"""The public MocoSFL release: its clients, where they lie in a folder, and what was measured of them."""
