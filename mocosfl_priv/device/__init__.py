"""A client on a real device: the program `mocosfl-priv-client` and all that it needs, without torch."""
