"""A run before the run: the same recipe through the same processes, with tiny models and a handful of rows."""
