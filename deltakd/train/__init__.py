"""One step and one loop for every method, with validation, checkpoints, and what a run records of itself."""
