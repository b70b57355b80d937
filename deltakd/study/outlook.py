"""What a grid of delta targets says at the reference tokens of some rows: one pass over chunks, all alphas in it.

From what the three frozen models said once (hidden states and heads, or logits): per chunk of n tokens three products,
then a mixture for each (alpha, temperature). Never [N, V]: memory is some ten [n, V] buffers in float32 or wider,
whatever the grid. Pure tensor maths.

Shapes: N supervised tokens, n tokens of a chunk, V shared vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltakd.losses.points import mix
from deltakd.losses.settings import DeltaTarget, point_weights

MODELS = ("teacher", "teacher_raw", "student_raw")
CHUNK_TOKENS = 256
Said = Mapping[str, Tensor | tuple[Tensor, Tensor]]  # by model: logits [N, >= V], or hidden states and their head


@dataclass(frozen=True)
class TargetFigures:
    """A target at one alpha and temperature, means over tokens: nats per token, accuracy between 0 and 1.

    All of it at the temperature, as the divergence is: the KLs are those of the target to the teacher and to the raw
    student at the same temperature, so at alpha 0 that to the teacher is 0.
    """

    alpha: float
    temperature: float
    cross_entropy: float
    accuracy: float
    entropy: float
    kl_to_teacher: float
    kl_to_student_raw: float


@dataclass(frozen=True)
class Outlook:
    """What can be said of a delta target before any training."""

    num_tokens: int
    cross_entropy: Mapping[str, float]  # of the frozen models on the references, at temperature 1
    ratio_mean: float  # of log student_raw - log teacher_raw at the reference tokens
    ratio_spread: float  # its standard deviation over tokens
    targets: Sequence[TargetFigures]


@dataclass
class Tally:
    """Sums over tokens, in float64, for a grid of alphas and temperatures."""

    alphas: Sequence[float]
    temperatures: Sequence[float]
    anchor: str = "teacher"
    num_tokens: int = 0
    _models: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MODELS, 0.0))
    _ratio: list[float] = field(default_factory=lambda: [0.0, 0.0])  # mean, sum of squared differences to it
    _targets: dict[tuple[float, float], list[float]] = field(default_factory=dict)

    @torch.inference_mode()
    def add(self, said: Said, labels_N: Tensor, vocab_size: int) -> None:
        """Take the tokens of one batch; logits beyond the shared vocabulary are cut off before all else."""
        for start in range(0, len(labels_N), CHUNK_TOKENS):
            few = slice(start, start + CHUNK_TOKENS)
            self._add_chunk({name: _logits(said[name], few, vocab_size) for name in MODELS}, labels_N[few])

    def _add_chunk(self, logits: Mapping[str, Tensor], labels_n: Tensor) -> None:
        rows = torch.arange(len(labels_n), device=labels_n.device)
        at_label = {}
        for name, values in logits.items():
            at_label[name] = values[rows, labels_n] - values.logsumexp(-1)
            self._models[name] -= _sum(at_label[name])
        self._add_ratio((at_label["student_raw"] - at_label["teacher_raw"]).double())
        self.num_tokens += len(labels_n)
        for alpha in self.alphas:
            target = mix(_weights(alpha, self.anchor), logits)
            assert target is not None  # a delta target mixes at least one model
            hits = float((target.argmax(-1) == labels_n).sum())
            for temperature in self.temperatures:
                log_p = torch.log_softmax(target / temperature, dim=-1)
                p = log_p.exp()
                parts = [-_sum(log_p[rows, labels_n]), hits, -_sum((p * log_p).sum(-1))]
                for name in ("teacher", "student_raw"):
                    log_q = torch.log_softmax(logits[name] / temperature, dim=-1)
                    parts.append(_sum((p * (log_p - log_q)).sum(-1)))
                sums = self._targets.setdefault((alpha, temperature), [0.0] * len(parts))
                self._targets[alpha, temperature] = [one + more for one, more in zip(sums, parts, strict=True)]

    def _add_ratio(self, ratio_n: Tensor) -> None:
        """Chan's update of mean and squares: sums of squares of a large mean would cancel."""
        before, num, (mean, squares) = self.num_tokens, len(ratio_n), self._ratio
        own = float(ratio_n.mean())
        shift = own - mean
        squares += float((ratio_n - own).square().sum()) + shift**2 * before * num / (before + num)
        self._ratio = [mean + shift * num / (before + num), squares]

    def outlook(self) -> Outlook:
        """Return the means over all tokens that were added; there must be some."""
        num, (mean, squares) = self.num_tokens, self._ratio
        targets = [TargetFigures(*key, *(one / num for one in sums)) for key, sums in self._targets.items()]
        return Outlook(
            num, {name: one / num for name, one in self._models.items()}, mean, (squares / num) ** 0.5, targets
        )


def look(batches: Iterable[tuple[Said, Tensor]], tally: Tally, vocab_size: int) -> Outlook:
    """Take (what was said, labels [N]) of every batch, each once."""
    for said, labels_N in batches:
        tally.add(said, labels_N, vocab_size)
    return tally.outlook()


def _weights(alpha: float, anchor: str) -> dict[str, float]:
    target = DeltaTarget.model_validate({"name": "delta", "alpha": alpha, "anchor": anchor})
    return point_weights(target, alpha)[0]


def _logits(said: Tensor | tuple[Tensor, Tensor], few: slice, vocab_size: int) -> Tensor:
    if isinstance(said, Tensor):
        logits = said[few, :vocab_size]
    else:
        hidden, head = said
        logits = hidden[few].to(head.dtype) @ head[:vocab_size].T
    return logits if logits.dtype == torch.float64 else logits.float()


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
