"""Services that all other packages use: device and threads, seeds, progress, memory, files, imports of user code."""
