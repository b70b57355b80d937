"""What every room stands on: errors, settings, ranks, processes, the run directory."""
