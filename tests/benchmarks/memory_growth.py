"""Growth of memory of a training pass from 1,024 to 16,384 positions, of every mechanism.

    python tests/benchmarks/memory_growth.py [--only nystrom,fnet]

One sequence, 2 heads of 32, in a layer built for its length, its last tokens masked where masks are
taken: peak of what a forward and a backward pass allocate, and the exponent fitted to it. Those
that declare linear memory should fit 1.1 at most; the others stop at 4,096 positions.
"""

import argparse

import numpy as np
import torch

from lra.measure import allocated_peak
from models import build_attention
from models.attention import ATTENTIONS
from models.attention.base import Mixer

LENGTHS = (1024, 2048, 4096, 8192, 16384)


def peak(name, n):
    sizes = {"num_heads": 2, "head_dim": 32, "max_len": n, "model_dim": 64}
    attention = build_attention(name, **sizes).train()
    x = torch.randn(1, n, 3, 2, 32, requires_grad=True)
    hidden = torch.randn(1, n, 64, requires_grad=True)
    mask = None
    if attention.capabilities.key_mask != "none":
        mask = (torch.arange(n) < n - 5).expand(1, -1)

    def step():
        if isinstance(attention, Mixer):
            attention(hidden, mask).sum().backward()
            return
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
        able = attention.capabilities
        more = {"hidden": hidden} if able.needs_hidden else {}
        attention(q, q if able.shared_query_key else k, v, mask, **more).sum().backward()

    return allocated_peak(step)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", type=lambda text: text.split(","))
    names = parser.parse_args().only or ATTENTIONS.names()
    print(f"torch {torch.__version__}, float32, MB by length, fitted exponent, declared growth")
    for name in names:
        declared = ATTENTIONS.get(name).capabilities.memory
        lengths = LENGTHS if declared == "N" else LENGTHS[:3]
        peaks = [peak(name, n) for n in lengths]
        exponent = np.polyfit(np.log(lengths), np.log(peaks), 1)[0]
        shown = "".join(f"{p / 1e6:9.1f}" for p in peaks)
        print(f"  {name:<12}{shown:<45}  {exponent:5.2f}  {declared}")


if __name__ == "__main__":
    main()
