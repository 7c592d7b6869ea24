"""The report of an audit, which attacks published client checkpoints again."""
