"""`deltakd doctor`: whether this machine can carry a run, line by line, before one is started."""
