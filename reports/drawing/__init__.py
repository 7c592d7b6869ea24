"""Charts of results, and pictures of victims and reconstructions."""
