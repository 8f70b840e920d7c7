"""Damage to files, JSON and words, drawn at random: what `tests/fuzz.py` gives to readers."""

import copy
import json
import shutil

NUMBERS = (0, -1, 1, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324)
VALUES = (
    None, True, False, "", "x", "../..", "$a_{b$", "é\ud800", "\x00\n|", [], {}, [1, "a"],
    {"name": 1}, float("nan"), float("inf"), -float("inf"), *NUMBERS,
)  # fmt: skip
"""What takes the place of a value in JSON."""

DEEP = "stands for lists in lists"


def damaged(random, content):
    """Returns bytes with one to three things done to them."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = random.choice(BYTES)(random, bytes(content))
    return content


def _flip(random, content):
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8)) if content else 0):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return content


def _slice(random, content):
    a, b = sorted(random.randrange(len(content) + 1) for _ in range(2))
    return a, min(b, a + random.choice((1, 4, 100, 10**6)))


def _remove(random, content):
    a, b = _slice(random, content)
    return content[:a] + content[b:]


def _repeat(random, content):
    a, b = _slice(random, content)
    return content[:b] + content[a:b] * random.choice((1, 1, 3)) + content[b:]


def _blank(random, content):
    a, b = _slice(random, content)
    return content[:a] + random.choice((b"\0", b"\xff", b" ", b"9")) * (b - a) + content[b:]


def _insert(random, content):
    a = random.randrange(len(content) + 1)
    pieces = (
        b"\0",
        b"\n",
        b"\r",
        b"\r\n",
        b"\t",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x1a",
        b'"',
        b"-",
    )
    return content[:a] + random.choice(pieces) * random.choice((1, 1, 7)) + content[a:]


def _line(random, content):
    return _insert_at_line(random, content, b"x" * random.choice((100, 100_000)))


def _insert_at_line(random, content, line):
    lines = content.split(b"\n")
    lines.insert(random.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


def _shuffle(random, content):
    lines = content.split(b"\n")
    random.shuffle(lines)
    return b"\n".join(lines)


def _encode(random, content):
    return content.decode("latin-1").encode(random.choice(("utf-16", "utf-32", "utf-7", "cp037")))


BYTES = (
    _flip,
    _flip,
    _flip,
    _remove,
    _repeat,
    _blank,
    _insert,
    _line,
    _shuffle,
    lambda random, content: _encode(random, content[: 1 << 20]),
    lambda random, content: content[: random.randrange(len(content) + 1)],
    lambda random, content: content.replace(b"\n", random.choice((b"\r\n", b"\r", b"", b"\n\n"))),
    lambda random, content: b"",
    lambda random, content: random.randbytes(random.choice((1, 100, 10_000))),
)


def put_damaged_line(random, path):
    """Damages the JSON of one line of a file."""
    lines = path.read_text().splitlines()
    place = random.randrange(len(lines))
    changed = [line.encode() for line in lines]
    changed[place] = damaged_json(random, lines[place])
    path.write_bytes(b"\n".join(changed) + b"\n")


def put_damaged(random, path):
    """Damages a file, or puts something else in its place; returns what it did."""
    if random.random() < 0.92:
        path.write_bytes(damaged(random, path.read_bytes()))
        return "its bytes"
    path.unlink()
    kind = random.choice(("directory", "full directory", "missing", "no target", "loop"))
    if "directory" in kind:
        path.mkdir()
    if kind == "full directory":
        (path / "file").write_text("content")
    if kind in ("no target", "loop"):
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    return kind


def put_back(path, good):
    """Puts a good copy of a file or folder in the place of whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    shutil.copytree(good, path) if good.is_dir() else shutil.copy2(good, path)


def damaged_json(random, text):
    """Returns JSON in which one to three values or keys are others, or JSON with damaged bytes."""
    if random.random() < 0.2:
        return damaged(random, text.encode())
    value = {"": json.loads(text)}
    for _ in range(random.choice((1, 1, 1, 1, 2, 3))):
        if value:
            change(random, value)
    written = json.dumps(value[""]) if "" in value else ""
    depth = random.choice((60, 400, 100_000))
    return written.replace(f'"{DEEP}"', "[" * depth + "]" * depth).encode()


def change(random, tree):
    """Changes one value or key somewhere in nested lists and dicts, in place."""
    places = list(_places(tree))
    owner, key = random.choice(places)
    kind = random.choice(("value",) * 8 + ("remove", "remove", "rename", "add", "swap", "deep"))
    if kind == "value":
        old = owner[key]
        owner[key] = copy.deepcopy(random.choice((*VALUES, str(old), [old], {"a": old})))
        if isinstance(old, int | float) and not isinstance(old, bool) and random.random() < 0.5:
            owner[key] = random.choice((-old, old + 1, old * 10**6, old // 3, *NUMBERS))
    elif kind == "remove":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[random.choice((f"{key}x", "", "Name", "é\ud800"))] = owner.pop(key)
    elif kind == "add" and isinstance(owner, dict):
        owner[random.choice(("new", "name", "", "schema"))] = copy.deepcopy(random.choice(VALUES))
    elif kind == "swap":
        other, its = random.choice(places)
        a, b = copy.deepcopy(owner[key]), copy.deepcopy(other[its])
        owner[key], other[its] = b, a
    else:
        owner[key] = DEEP


def _places(tree):
    """Yields every (owner, key) in nested lists and dicts."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


PIECES = (
    "=", ",", ".", "+", "++", "~", "@", "[", "]", "{", "}", ":", "'", '"', "\\", "$", "${", " ",
    "\n", "\t", "é", "\udce9", "*", "(", ")", "-", "--", "/", "#", "%", "|", "0", "9" * 30,
)  # fmt: skip

SETTINGS = (
    "null", "true", "1", "0", "-1", "1e999", "nan", "inf", "-inf", "1.5", "9" * 30, "9" * 400, "''",
    "[]", "[1,2]", "{a: 1}", "{}", "[[1],[2]]", "${seed}", "${nothing}", "${oc.env:HOME}",
    "${oc.env:NO_SUCH}", "${model}", "${", "range(3)", "range(0,10,0)", "range(1,1000000000000)",
    "range(0,1,1e-300)", "range(0,1,nan)", "shuffle(range(100000000))", "glob(*)", "glob(z*)",
    "choice(1,2)", "choice()", "interval(0,1)", "sort(3,1)", "sort(range(3))", "tag(a,1)",
    "int(3.7)", "int(x)", "float(x)", "str([1])", "bool(2)", "extend_list(1)", "json_str(a)",
    "a,b", "1,2,3", ",", "~nobody/x", "~", ".", "..", "a/b", "x" * 5000, "[" * 200 + "]" * 200,
    "[" * 5000, "(" * 300, "1e-400", "0x10", "1_000", "softmax", "listops", "smoke", "?", "???",
    "é", "\udce9",
)  # fmt: skip
"""Values of overrides that are wrong somewhere."""


def damaged_words(random, words, keys):
    """Returns overrides or arguments, of which one or two are others.

    Args:
        random: Draws.
        words: The arguments.
        keys: Keys of overrides that exist.
    """
    words = list(words)
    for _ in range(random.choice((1, 1, 2))):
        kind = random.choice(("value", "value", "value", "key", "letters", "new", "drop", "twice"))
        place = random.randrange(len(words)) if words else 0
        key, equals, _ = words[place].partition("=") if words else ("", "", "")
        if kind == "value" and equals:
            words[place] = f"{key}={random.choice(SETTINGS)}"
        elif kind == "key" and equals:
            other = random.choice((f"+{key}", f"++{key}", f"~{key}", f"{key}x", key[:-1], f"{key}.a"
                                   , f"{key}@b", "", key.upper(), random.choice(keys)))  # fmt: skip
            words[place] = words[place].replace(key, other, 1)
        elif kind == "letters" and words:
            word = words[place]
            a = random.randrange(len(word) + 1)
            words[place] = (
                word[:a] + random.choice(PIECES) + word[a + random.choice((0, 0, 1, 3)) :]
            )
        elif kind == "drop" and words:
            del words[place]
        elif kind == "twice" and words:
            words.insert(place, words[place])
        else:
            new = f"{random.choice(keys)}={random.choice(SETTINGS)}"
            words.insert(place, random.choice((new, new, new, random.choice(SETTINGS), "")))
    return words
