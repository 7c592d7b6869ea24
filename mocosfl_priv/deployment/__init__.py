"""The server of real clients: what it hands to devices, how it receives them, and what they cost."""
