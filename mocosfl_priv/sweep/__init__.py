"""From one configuration to a grid of cells, and running them."""
