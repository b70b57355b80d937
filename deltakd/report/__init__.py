"""One page about finished and unfinished runs: what was measured, what was not, and how each of them went."""
