"""Files: whole or not there, locked by one process, hashed the same everywhere."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.files import (
    Busy,
    canonical_json,
    file_hash,
    locked,
    parsed,
    short_hash,
    user_path,
    write_atomically,
    write_text,
)

ROOT = Path(__file__).parents[1]

deterministic = settings(derandomize=True, deadline=None, max_examples=50)


def start(script, *arguments):
    """Starts a Python process and returns it when it has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process):
    process.kill()
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


# Atomic writes


def test_a_file_is_written_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "a long first content")
    write_text(path, "short")
    assert path.read_text() == "short"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_writer_that_raises_leaves_the_old_file_and_no_temporary_one(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(file):
        file.write(b"new and half")
        file.flush()
        raise error("stop")

    with pytest.raises(error, match="stop"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_raises_leaves_no_file_where_there_was_none(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "file.txt", lambda file: file.write(b"%d" % (1 // 0)))
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_the_old_one_as_long_as_the_new_one_is_being_written(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    seen = []

    def write(file):
        file.write(b"new")
        file.flush()
        seen.append(path.read_text())

    write_atomically(path, write)
    assert seen == ["old"]
    assert path.read_text() == "new"


KILLED = """
import sys, time
from pathlib import Path
from lra.files import write_atomically

def write(file):
    file.write(b"new and half")
    file.flush()
    print("ready", flush=True)
    time.sleep(60)

write_atomically(Path(sys.argv[1]), write)
"""


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    kill(start(KILLED, path))
    assert path.read_text() == "old"


def test_what_a_killed_process_leaves_does_not_stand_in_the_way_of_the_next_write(tmp_path):
    path = tmp_path / "file.txt"
    kill(start(KILLED, path))
    assert not path.exists()
    write_text(path, "new")
    assert path.read_text() == "new"


# Locks

HOLDER = """
import sys, time
from pathlib import Path
from lra.files import locked

with locked(Path(sys.argv[1]), wait=False):
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
    Path(sys.argv[1] + ".done").touch()
"""


def test_a_second_holder_is_told_that_the_lock_is_taken(tmp_path):
    path = tmp_path / "run" / ".lock"
    holder = start(HOLDER, path, 60)
    with pytest.raises(Busy, match=r"run/\.lock is locked by another process"), locked(path, False):
        pytest.fail("the lock was given twice")
    kill(holder)


def test_a_lock_is_free_again_when_its_holder_is_killed(tmp_path):
    path = tmp_path / ".lock"
    kill(start(HOLDER, path, 60))
    with locked(path, wait=False):
        pass


def test_a_lock_is_free_again_after_its_block_and_after_an_error_in_it(tmp_path):
    path = tmp_path / ".lock"
    with locked(path, wait=False):
        pass
    with pytest.raises(ZeroDivisionError), locked(path, wait=False):
        raise ZeroDivisionError
    with locked(path, wait=False):
        pass


def test_who_waits_gets_the_lock_when_the_holder_is_done(tmp_path):
    path = tmp_path / ".lock"
    holder = start(HOLDER, path, 0.3)
    with locked(path, wait=True):
        assert path.with_name(".lock.done").exists()
    holder.wait()
    holder.stdout.close()


def test_two_locks_do_not_hinder_each_other(tmp_path):
    with locked(tmp_path / "a.lock", wait=False), locked(tmp_path / "b.lock", wait=False):
        pass


# Hashes


def test_canonical_json_is_pinned():
    value = {"b": [1, 2.5, None, True], "a": {"é": "x y"}}
    assert canonical_json(value) == '{"a":{"\\u00e9":"x y"},"b":[1,2.5,null,true]}'


def test_short_hashes_are_pinned_so_that_runs_of_yesterday_are_found_today():
    value = {"b": 1, "a": [1, 2]}
    # printf '{"a":[1,2],"b":1}' | sha256sum
    assert short_hash(value) == "94a786c3"
    assert short_hash(value, 12) == "94a786c3662b"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@deterministic
@given(plain)
def test_canonical_json_keeps_the_value(value):
    assert json.loads(canonical_json(value)) == value


@deterministic
@given(st.dictionaries(st.text(), plain), st.randoms(use_true_random=False))
def test_the_order_of_keys_changes_no_hash(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert short_hash(dict(items)) == short_hash(value)


def test_a_changed_value_changes_the_hash():
    values = [{}, {"a": 1}, {"a": 2}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": None}, {"a": True}]
    assert len({short_hash(value) for value in values}) == len(values)


def test_tuples_and_lists_hash_alike_since_json_knows_no_tuples():
    assert short_hash({"betas": (0.9, 0.999)}) == short_hash({"betas": [0.9, 0.999]})


def test_a_files_hash_is_the_sha256_of_its_content(tmp_path):
    path = tmp_path / "file"
    content = bytes(range(256)) * 10_000
    path.write_bytes(content)
    assert file_hash(path) == hashlib.sha256(content).hexdigest()


# JSON of others


@pytest.mark.parametrize("depth", [60, 400, 100_000])
def test_json_that_is_nested_too_deeply_is_refused_and_no_crash(depth):
    with pytest.raises(ValueError, match="nested more than"):
        parsed("[" * depth + "]" * depth)


def test_json_is_read_as_json():
    assert parsed('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    with pytest.raises(ValueError, match="Expecting"):
        parsed("{")


def test_half_a_surrogate_pair_is_refused_before_a_table_meets_it():
    assert parsed(r'"\ud83d\ude00"') == "\U0001f600"
    with pytest.raises(ValueError, match="half a surrogate pair"):
        parsed(r'{"name": "\ud800"}')


def test_a_home_folder_of_nobody_is_refused_by_its_name():
    assert user_path("~/a") == Path.home() / "a"
    with pytest.raises(ValueError, match="~nobody-of-this-name/a"):
        user_path("~nobody-of-this-name/a")


def test_a_name_that_is_no_text_is_written_as_escapes(tmp_path):
    write_text(tmp_path / "file", "caf\udce9")
    assert (tmp_path / "file").read_bytes() == b"caf\\udce9"
