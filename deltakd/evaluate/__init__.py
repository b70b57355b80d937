"""How good a model is on held-out prompts: generation, ROUGE, cross-entropy on the references, paired intervals."""
