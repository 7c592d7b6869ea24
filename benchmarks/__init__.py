"""What takes how long, measured in pairs on the machine at hand. Never part of the tests."""
