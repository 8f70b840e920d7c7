"""Seconds a training step of the `nystrom` ListOps model, and ratios; run it on an idle machine.

    python tests/benchmarks/training_step.py [--rounds 5] [--only nystrom,fnet] [--profile]

Every round takes one step of each contestant in turn, so that drift favours none; the medians are
compared. `bare SDPA` is a model of the same size written out with plain torch modules around
`scaled_dot_product_attention` and the project's dropout, to show what the harness itself costs.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile

from lra.compose import load, load_attentions
from lra.measure import Clock
from lra.run import new_record
from lra.tasks.base import Prepared, Split
from lra.train import Trainer
from models.attention import capabilities
from models.dropout import Dropout

CPU = torch.device("cpu")
BATCH, LENGTH, DIM, HEADS, HIDDEN, CLASSES = 32, 2048, 64, 2, 128, 10


class BareBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.dropout = Dropout(0.1)
        self.ffn = nn.Sequential(
            nn.Linear(DIM, HIDDEN),
            nn.GELU(),
            Dropout(0.1),
            nn.Linear(HIDDEN, DIM),
            Dropout(0.1),
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, HEADS, -1).unbind(2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.ffn(self.norms[1](x))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(32, DIM)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, DIM))
        self.dropout = Dropout(0.1)
        self.blocks = nn.Sequential(BareBlock(), BareBlock())
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))

    def forward(self, tokens):
        x = self.dropout(self.tokens(tokens) + self.positions)
        return self.head(self.norm(self.blocks(x)).mean(1))


def bare_step():
    model = Bare()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, labels = torch.randint(1, 16, (BATCH, LENGTH)), torch.randint(0, CLASSES, (BATCH,))

    def step():
        F.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def filled():
    """Examples that fill all positions."""
    random = np.random.default_rng(0)

    def split(n):
        tokens = random.integers(1, 16, n * LENGTH, dtype=np.uint8)
        labels = random.integers(0, CLASSES, n, dtype=np.uint8)
        return Split.of(tokens, np.arange(n + 1) * LENGTH, labels)

    return Prepared({"train": split(256), "val": split(8), "test": split(8)}, {})


def harness_step(prepared, *overrides):
    class NoStop:
        signal = None

    config = load(["protocol=nystrom", "tracker=none", *overrides])
    prepared = prepared or config.build_task().prepare()
    folder = Path(tempfile.mkdtemp())
    record = new_record(config)
    return Trainer(config, record, prepared, folder, CPU, NoStop(), Clock(CPU))._step


def compare(title, reference, steps, rounds, profiled):
    for step in steps.values():
        step()
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    base = median(seconds[reference])
    print(f"\n{title}; median, spread of {rounds} steps; speed in multiples of {reference}")
    for name, taken in seconds.items():
        middle = median(taken)
        spread = f"{min(taken):.3f} to {max(taken):.3f}"
        print(f"  {name:<34} {middle:7.3f} s  ({spread})  {base / middle:5.2f}")
    for name, step in steps.items() if profiled else ():
        with profile() as spent:
            step()
        print(f"\nwhere {name} spends its time")
        print(spent.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))


MECHANISMS = {
    "linear (elu+1)": ["attention=linear"],
    "linear (relu)": ["attention=linear", "attention.feature=relu"],
    "cosformer": ["attention=cosformer"],
    "rfa (D = 64)": ["attention=rfa", "attention.projections=64"],
    "performer (256 features)": ["attention=performer", "attention.features=256"],
    "performer (relu)": ["attention=performer", "attention.kernel=relu"],
    "retnet": ["attention=retnet"],
    "linformer (256)": ["attention=linformer"],
    "nystrom (64 landmarks)": ["attention=nystrom"],
    "skyformer (128 landmarks)": ["attention=skyformer"],
    "kernelized": ["attention=kernelized"],
    "local (block 64)": ["attention=local"],
    "local (neighbours, 64)": ["attention=local", "attention.pattern=neighbour"],
    "local (band, reach 64)": ["attention=local", "attention.pattern=band"],
    "longformer (reach 64)": ["attention=longformer", "attention.window=128"],
    "longformer (window 512)": ["attention=longformer"],
    "sparse (fixed)": ["attention=sparse"],
    "sparse (strided)": ["attention=sparse", "attention.pattern=strided"],
    "bigbird": ["attention=bigbird"],
    "reformer": ["attention=reformer"],
    "sinkhorn": ["attention=sinkhorn"],
    "synthesizer (random)": ["attention=synthesizer"],
    "fnet": ["attention=fnet"],
}
"""What is compared with softmax; a mechanism's options where they are not its defaults."""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, batch {BATCH}")

    def chosen(steps):
        """Returns the steps of the mechanisms asked for, with softmax to compare them with."""
        names = given.only or [""]
        kept = {n: make for n, make in steps.items() if any(part in n for part in names)}
        return {n: make() for n, make in (steps | kept).items() if n in kept or "softmax" in n}

    dry = "model.attention_dropout=0"
    full = filled()
    compare(
        f"all {LENGTH} positions filled, no attention dropout",
        "softmax",
        chosen(
            {"bare SDPA": bare_step, "softmax": partial(harness_step, full, dry)}
            | {n: partial(harness_step, full, dry, *m) for n, m in MECHANISMS.items()}
        ),
        given.rounds,
        given.profile,
    )
    compare(
        f"all {LENGTH} positions filled, attention dropout 0.1 where the mechanism has it",
        "softmax",
        chosen(
            {"softmax": partial(harness_step, full)}
            | {n: partial(harness_step, full, *m) for n, m in MECHANISMS.items() if dropping(m)}
        ),
        given.rounds,
        given.profile,
    )
    few = ("linear (relu)", "cosformer", "rfa (D = 64)")
    whole = "micro_batches=1"
    compare(
        "real lengths, mean 1,035; `whole`: padded to the batch's longest; no attention dropout",
        "softmax",
        chosen(
            {
                "softmax": partial(harness_step, None, dry),
                "softmax, whole": partial(harness_step, None, dry, whole),
                "cosformer, whole": partial(harness_step, None, "attention=cosformer", whole),
            }
            | {n: partial(harness_step, None, *MECHANISMS[n]) for n in few}
        ),
        given.rounds,
        given.profile,
    )


def dropping(overrides):
    """Whether a mechanism has attention dropout."""
    [(name, options)] = load_attentions(overrides)
    return capabilities(name, options).dropout == "weights"


if __name__ == "__main__":
    main()
