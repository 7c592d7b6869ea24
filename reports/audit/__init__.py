"""The page of an audit of published clients."""
