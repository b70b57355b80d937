"""Measurements that anyone can repeat: every figure of docs/results/ that is not a training run's comes from here."""
