"""Training with clients on real devices: the server side (export, communication, certificates, costs)."""
