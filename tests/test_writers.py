"""Eight processes on one store and on one run folder; `tests/writers.py` is what runs them."""

import re
import subprocess
import sys

from conftest import ROOT


def test_eight_writers_lose_nothing_and_one_folder_has_one_writer(environment, tmp_path):
    # A process of its own: the one of the tests has threads, and is not to be forked.
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "writers.py"],
        env=environment | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    store, folder = done.stdout.splitlines()
    assert store == "8 processes finished at once: 8 whole records"
    told = re.fullmatch(
        r"8 processes began one run: 1 trained, (\d) were refused, (\d) found it finished", folder
    )
    assert told, folder
    assert sum(map(int, told.groups())) == 7
