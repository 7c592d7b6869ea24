"""The pages of the documentation, and what makes one of them."""
