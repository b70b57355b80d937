"""What `deltakd bench losses` measures: the candidates by name, and the sizes of one measurement. Imports no torch."""

from dataclasses import dataclass

NAMES = {
    "deltakd": "linear_loss",
    "plain": "log_softmax over [N, V]",
    "compiled": "torch.compile of plain",
    "trl": "TRL's GKD loss; needs `pip install trl`",
    "liger": "Liger's fused linear JSD; needs a GPU and requirements-gpu.txt",
}


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement; hidden sizes and vocabulary are Qwen2.5 7B -> 1.5B's by default."""

    name: str
    tokens: int = 2048
    hidden: int = 1536
    teacher_hidden: int = 3584
    vocab: int = 151_936
    dtype: str = "float32"
    chunk_tokens: int = 512
    repeats: int = 2
    device: str = "cpu"
