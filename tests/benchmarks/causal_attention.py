"""Causal linear attention in chunks, against the form that accumulates outer products.

    python tests/benchmarks/causal_attention.py [--rounds 5]

Prints seconds of a forward and backward pass, and the peak of what it allocates, of cosFormer at
N = 4,096, D = 64 (F = 128 features): chunked, accumulated, and the bidirectional form, one after
the other in every round; medians are compared. Run it on an idle machine.
"""

import argparse
import time
from statistics import median

import torch
import torch.nn.functional as F

from lra.measure import allocated_peak
from models import build_attention
from models.attention.base import Context

N, D, HEADS, BATCH = 4096, 64, 4, 1


def accumulated(attention, q, k, v):
    """Causal attention by the running sum of all N outer products, as public code has it."""
    f = attention.features(q, k, Context(None, causal=True, hidden=None))
    rows = F.pad(v, (0, 1), value=1.0)
    products = (f.k[..., :, None] * rows[..., None, :]).cumsum(-3)
    sums = (f.q[..., None, :] @ products).squeeze(-2)
    return sums[..., :-1] / sums[..., -1:].clamp_min(1e-6)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    attention = build_attention(
        "cosformer", num_heads=HEADS, head_dim=D, max_len=N, model_dim=HEADS * D
    )
    q, k, v = (torch.randn(BATCH, HEADS, N, D, requires_grad=True) for _ in range(3))
    forms = {
        "bidirectional": lambda: attention(q, k, v),
        "causal, in chunks": lambda: attention(q, k, v, causal=True),
        "causal, accumulated": lambda: accumulated(attention, q, k, v),
    }
    difference = forms["causal, in chunks"]() - forms["causal, accumulated"]()
    print(f"B={BATCH}, H={HEADS}, N={N}, D=E={D}, float32, {torch.get_num_threads()} threads")
    print(f"largest difference of the two causal outputs: {difference.abs().max():.1e}")

    passes = {name: lambda form=form: form().sum().backward() for name, form in forms.items()}
    peaks = {name: allocated_peak(one) for name, one in passes.items()}
    seconds = {name: [] for name in passes}
    for _ in range(rounds):
        for name, one in passes.items():
            start = time.perf_counter()
            one()
            seconds[name].append(time.perf_counter() - start)
    times = {name: median(taken) for name, taken in seconds.items()}
    for name in passes:
        print(f"{name:<20} {times[name]:8.4f} s  {peaks[name] / 1e6:9.1f} MB")
    chunks, sums, both = "causal, in chunks", "causal, accumulated", "bidirectional"
    print(f"in chunks / accumulated: {times[sums] / times[chunks]:.1f} times faster")
    print(f"in chunks / bidirectional: {peaks[chunks] / peaks[both]:.2f} of the memory, ", end="")
    print(f"{times[chunks] / times[both]:.2f} of the time")


if __name__ == "__main__":
    main()
