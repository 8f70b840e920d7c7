"""The fuzz campaign in small; `tests/fuzz.py` runs as many cases as you like."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

OURS = ["command lines", "records", "checkpoints", "cells", "cache", "parts"]
THEIRS = ["listops files", "retrieval files", "citations files", "pathfinder files"]
THEIRS += ["text parquet files", "text folder", "image parquet files"]


@pytest.mark.parametrize(("cases", "targets"), [(125, OURS), (145, THEIRS)])
def test_damage_ends_in_a_message_and_loses_nothing(environment, tmp_path, cases, targets):
    # A process of its own: the one of the tests has threads, and is not to be forked.
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz.py", "--cases", str(cases), "--target", *targets],
        env=environment | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(.*): \d+ cases", done.stdout, re.MULTILINE) == targets
