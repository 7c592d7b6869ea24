"""The public MocoSFL release: loading its clients, finding them in a folder, and reading its logs."""
