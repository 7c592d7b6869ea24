"""What every room stands on: device and threads, seeds, progress, memory, files, imports of a user's code."""
