"""What every room stands on: errors, settings, ranks, processes and the run directory. Imports nothing of ours above it."""
