"""Pages, documents and tables as files."""
