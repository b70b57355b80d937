"""Delta knowledge distillation: teach a small language model the shift that fine-tuning put into a large one."""

__version__ = "0.1.0"
