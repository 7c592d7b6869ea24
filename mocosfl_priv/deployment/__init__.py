"""Real clients: what a server makes for devices and knows about them."""
