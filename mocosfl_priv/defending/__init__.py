"""What defenses share: noise, decoders to train against, and experts trained at the server."""
