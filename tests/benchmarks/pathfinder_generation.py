"""Pathfinder images a second on one core, and what compiling costs; run it on an idle machine.

    taskset -c 0 python tests/benchmarks/pathfinder_generation.py [--rounds 3]

Compared with the original program, which took 0.15 s for an image of 32 pixels and 1.29 s for one
of 128 on one core of another machine. The best round counts.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lra.tasks._pathfinder import generate, geometry, marker_distances

ORIGINAL = {32: 0.15, 128: 1.29}
COUNT = {32: 4_000, 128: 400}
ROOT = Path(__file__).parents[2]

FIRST = """
import time
from lra.tasks._pathfinder import generate, geometry
start = time.perf_counter()
generate(geometry(32), seed=0, first=0, count=1)
print(time.perf_counter() - start)
"""


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def first_image(cache):
    """Seconds that a new process takes for its first image."""
    environment = os.environ | {"NUMBA_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FIRST]
    return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE).stdout)


def compare(window, rounds):
    """Prints the best of some rounds."""
    one, images = geometry(window), {"seed": 0, "first": 0, "count": COUNT[window]}
    drawn, _, _ = generate(one, **images)
    best = min(seconds(lambda: generate(one, **images)) for _ in range(rounds))
    found = min(seconds(lambda: marker_distances(drawn, one)) for _ in range(rounds))
    speed = COUNT[window] / best
    print(
        f"{window} pixels: {speed:,.0f} images/s, {speed * ORIGINAL[window]:,.0f} times the "
        f"original; their markers are found at {COUNT[window] / found:,.0f} images/s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as cache:
        compiled, kept = first_image(cache), first_image(cache)
    print(f"first image: {compiled:.1f} s with compiling, {kept:.1f} s with what it left on disk")
    for window in COUNT:
        compare(window, rounds)


if __name__ == "__main__":
    main()
