"""MocoSFL: clients, server, and the loop between them."""
