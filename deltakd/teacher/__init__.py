"""Frozen models in processes of their own: they answer for token ids, the numbers go through shared memory."""
