"""Training of MocoSFL: clients, server, the step that joins them, and the training loop."""
