"""The chunked loss holds a few chunks, whatever the number of tokens: measured, in a process of its own."""

import subprocess
import sys

import pytest

MEMORY = """
import sys, torch
from deltakd.bench.candidates import peak_bytes
from deltakd.losses import linear_loss, objective
num_tokens, divergence, hidden_size, vocab, chunk = int(sys.argv[1]), sys.argv[2], 16, 100_000, 128
torch.set_num_threads(1)
loss = objective({"target": {"name": "delta"}, "divergence": divergence})
def pair():
    return torch.randn(num_tokens, hidden_size), torch.randn(vocab, hidden_size)
(hidden, head), pairs = pair(), {name: pair() for name in loss.needs}
hidden.requires_grad_(); head.requires_grad_()
labels = torch.zeros(num_tokens, dtype=torch.int64)
few = slice(0, 2)
linear_loss(hidden[few], head, {n: (h[few], w) for n, (h, w) in pairs.items()}, labels[few], loss, 2).total.backward()
hidden.grad = head.grad = None
before = peak_bytes("cpu", reset=True)
linear_loss(hidden, head, pairs, labels, loss, chunk).total.backward()
gradients = 4 * hidden_size * (num_tokens + vocab)
print((peak_bytes("cpu") - before - gradients) / (4 * chunk * vocab))
"""


@pytest.mark.parametrize("divergence, most_tokens", [("forward_kl", 2048), ("adaptive_kl", 512)])
def test_peak_memory_is_at_most_four_chunks_whatever_the_number_of_tokens(divergence, most_tokens):
    """Resident memory of a process of its own, in units of one float32 [chunk_tokens, V]; adaptive_kl also sorts."""
    peaks = [
        float(
            subprocess.run([sys.executable, "-c", MEMORY, str(n), divergence], capture_output=True, check=True).stdout
        )
        for n in (256, most_tokens)
    ]
    assert 1 < max(peaks) < 4, peaks
    assert abs(peaks[0] - peaks[1]) < 1, peaks  # one [N, V] would add 2 or 14; the allocator's own slack is below 1
