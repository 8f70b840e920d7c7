"""The kill test in small; `tests/kills.py` makes as many kills as you like."""

import re
import subprocess
import sys

from conftest import ROOT

ATTENTIONS = ("softmax", "cosformer", "rfa")


def test_runs_killed_ten_times_in_all_phases_end_as_if_nothing_had_happened(environment, tmp_path):
    # A process of its own: the one of the tests has threads, and is not to be forked.
    script = [sys.executable, ROOT / "tests" / "kills.py", "--kills", "10", "--task", "citations"]
    done = subprocess.run(
        [*script, "--attention", *ATTENTIONS],
        env=environment | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(
        r"(\w+) on citations: (\d+) kills \((\d+) training, (\d+) evaluation, (\d+) checkpoint "
        r"writing, \d+ other\) .* every end is the same bit by bit",
        done.stdout,
    )
    assert [(name, kills) for name, kills, *_ in lines] == [
        *zip(ATTENTIONS, ("4", "3", "3"), strict=True)
    ]
    for phase in zip(*[counts for _, _, *counts in lines], strict=True):
        assert sum(map(int, phase)) > 0, done.stdout
