"""The leaderboard of one protocol: a table for each task, accuracy, cost and rules side by side."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import pandas as pd

from lra.record import Record

DASH = "–"
NOT_LEARNED, LARGER, MODIFIED, LEGACY = "†", "‡", "*", "§"

MARKS = {
    NOT_LEARNED: "not learned: the 95 % interval of a run reaches the majority class",
    LARGER: "more than 110 % of the parameters of the softmax model",
    MODIFIED: "departs from the protocol, as said in brackets",
    LEGACY: "legacy validation: the test split was also the validation split; the last step counts",
}

COLUMNS = {
    "name": "attention",
    "accuracy": "test accuracy %",
    "interval": "95 % interval",
    "seeds": "seeds",
    "parameters": "parameters",
    "ratio": "vs softmax",
    "train": "train s",
    "steps": "steps/s",
    "tokens": "tokens/s",
    "memory": "peak MB",
    "conditions": "conditions",
}


class Leaderboard:
    """The tables of one protocol's records.

    Records of one setting (equal hash) make a row, whatever their seeds; different settings are
    never averaged, and different versions of a task never share a table.

    Args:
        records: The records, at least one.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.protocol = records[0].protocol
        self.records = records
        tables: dict[tuple[str, int, str, str], list[Record]] = {}
        for r in records:
            task = r.task
            key = (task["name"], task["version"], task["fingerprint"], _data(r, records))
            tables.setdefault(key, []).append(r)
        self.tables = {key: (group, _rows(group)) for key, group in sorted(tables.items())}

    def markdown(self) -> str:
        """Returns the tables as a Markdown document."""
        parts = [f"# Leaderboard, protocol {self.protocol}"]
        for (task, version, _, data), (records, rows) in self.tables.items():
            parts.append(f"## {task}\n" + _data_line(records, version, data))
            parts.append(_markdown_table(rows))
            conditions = {row["conditions"] for row in rows if "conditions" in row}
            if len(conditions) == 1:
                parts.append(f"Speed and memory: {conditions.pop()}.")
            used = "".join(row["marks"] for row in rows)
            notes = [f"{mark} {meaning}." for mark, meaning in MARKS.items() if mark in used]
            if notes:
                parts.append("\n".join(f"{note}\\" for note in notes).rstrip("\\"))
        parts.append(self._origin())
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """Returns all rows with their unrounded figures as CSV."""
        frame = pd.DataFrame(
            {"protocol": self.protocol, "task": task, "task_version": version, "data": data}
            | {key: value for key, value in row.items() if key != "marks"}
            for (task, version, _, data), (_, rows) in self.tables.items()
            for row in rows
        )
        return frame.convert_dtypes().to_csv(index=False, lineterminator="\n")

    def _origin(self) -> str:
        """Returns how the tables were made: records, code, packages, dates."""
        commits = {
            str(r.commit["commit"])[:10] + (" (modified)" if r.commit["dirty"] else "")
            for r in self.records
        }
        torch = {r.versions["torch"] for r in self.records}
        days = sorted(r.started[:10] for r in self.records)
        dates = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
        return (
            f"Made by `lra report` from {len(self.records)} records of {dates}; torch "
            f"{', '.join(sorted(torch))}; code {', '.join(sorted(commits))}."
        )


def _data(r: Record, records: Sequence[Record]) -> str:
    """Returns the hash of a record's data; of a run that ended before it had any, its siblings'."""
    known = [r, *records] if "data_hash" in r.task else records
    hashes = (
        one.task["data_hash"]
        for one in known
        if one.task["fingerprint"] == r.task["fingerprint"] and "data_hash" in one.task
    )
    return next(hashes, r.task["fingerprint"])


def _rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns the rows of one task: settings by accuracy, then the rules that learn nothing."""
    settings: dict[str, list[Record]] = {}
    for r in records:
        settings.setdefault(r.hash, []).append(r)
    rows = [_row(group) for group in settings.values()]
    rows.sort(
        key=lambda row: (
            -(row["accuracy"] if row["accuracy"] is not None else -1),
            row["name"],
            row["hash"],
        )
    )
    for r in records:
        if "baselines" in r.task:
            n = r.task["splits"]["test"]["examples"]
            return rows + [
                {"kind": "rule", "name": name, "accuracy": 100 * score, "n": n, "marks": ""}
                for name, score in sorted(r.task["baselines"].items(), key=lambda item: item[1])
            ]
    return rows


def _row(records: Sequence[Record]) -> dict[str, Any]:
    """Returns the figures of one setting over its seeds."""
    done = [r for r in records if r.status == "ok" and r.test is not None]
    failed = [r for r in records if r.status != "ok"]
    first = (done or list(records))[0]
    options = "".join(f" {key}={value}" for key, value in first.attention["non_default"].items())
    modified = ", ".join(f"{key}={value[1]}" for key, value in first.modified.items())
    conditions = sorted({_conditions(r) for r in done or records})
    row: dict[str, Any] = {
        "kind": "attention",
        "name": first.attention["name"] + options + (f" ({modified})" if modified else ""),
        "accuracy": None,
        "seeds": len(done),
        "status": ", ".join(sorted({r.status for r in failed})) or "ok",
        "parameters": first.parameters,
        "ratio": _ratio(first),
        "conditions": "; ".join(conditions),
        "hash": first.hash,
        "marks": MODIFIED if modified else "",
    }
    if row["ratio"] and row["ratio"] > 1.1:
        row["marks"] += LARGER
    if first.task.get("validation_is_test"):
        row["marks"] += LEGACY
    scores = [r.test for r in done if r.test]
    if not scores:
        return row
    row |= {
        "accuracy": 100 * mean(score.accuracy for score in scores),
        "sd": 100 * stdev(score.accuracy for score in scores) if len(scores) > 1 else None,
        "n": scores[0].n,
    }
    if len(scores) == 1:  # over several seeds their deviation tells more
        row |= {"low": 100 * scores[0].low, "high": 100 * scores[0].high}
    if mean(score.low for score in scores) <= first.task["baselines"]["majority class"]:
        row["marks"] += NOT_LEARNED
    if len(conditions) == 1:  # figures of two devices have no mean
        speeds = [r.throughput for r in done if r.throughput]
        memory = [r.peak_memory_bytes for r in done if r.peak_memory_bytes]
        row |= {
            "train_seconds": mean(r.train_seconds for r in done),
            "evaluation_seconds": mean(r.evaluation_seconds for r in done),
            "steps_per_second": mean(s.steps_per_second for s in speeds) if speeds else None,
            "tokens_per_second": mean(s.tokens_per_second for s in speeds) if speeds else None,
            "peak_megabytes": mean(memory) / 1e6 if memory else None,
        }
    return row


def _conditions(r: Record) -> str:
    """Returns what speed and memory depend on; they compare only where it is the same."""
    told = f"{r.device['name']}, {r.device['threads']} threads, {r.precision['name']}"
    shared = r.device.get("runs_at_once", 1)
    return told + (f", {shared} runs at once" if shared > 1 else "")


def _ratio(r: Record) -> float | None:
    if r.parameters is None or not r.parameters_of_softmax:
        return None
    return r.parameters / r.parameters_of_softmax


def _data_line(records: Sequence[Record], version: int, fingerprint: str) -> str:
    """Returns one line on the data of a table."""
    for r in records:
        if "splits" in r.task:
            parts = [f"{s['examples']:,} {name}" for name, s in r.task["splits"].items()]
            longest = max(s["longest"] for s in r.task["splits"].values())
            return (
                f"{' / '.join(parts)} examples of up to {longest:,} tokens; version {version}, "
                f"data {r.task['data_hash']}. Chance {r.task['chance']:.0%}."
            )
    return f"Version {version}, settings {fingerprint}."


def _markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as an aligned Markdown table."""
    cells = [list(COLUMNS.values()), *(_cells(row) for row in rows)]
    # A column in which nothing stands is left out, and so are conditions that are all the same.
    kept = [
        i
        for i, key in enumerate(COLUMNS)
        if len({row[i] for row in cells[1:]} - {DASH}) > (key == "conditions")
    ]
    widths = [max(len(row[i]) for row in cells) for i in kept]
    lines = [
        "| "
        + " | ".join(
            row[i].ljust(w) if i == 0 else row[i].rjust(w)
            for i, w in zip(kept, widths, strict=True)
        )
        + " |"
        for row in cells
    ]
    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in zip(kept, widths, strict=True)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def _cells(row: dict[str, Any]) -> list[str]:
    """Returns a row's figures as text, in the order of ``COLUMNS``."""
    accuracy = DASH
    if row["accuracy"] is not None:
        accuracy = f"{row['accuracy']:.2f}"
        if row.get("sd") is not None:
            accuracy += f" ± {row['sd']:.2f}"
    elif "status" in row:
        accuracy = "✗ " + row["status"]
    seeds = _format("{}", row.get("seeds"))
    if row.get("seeds") and row["status"] != "ok":
        seeds += f" (others: {row['status']})"
    shown = {
        "name": f"*{row['name']}*" if row["kind"] == "rule" else row["name"] + row["marks"],
        "accuracy": accuracy,
        "interval": _format("{:.1f} to {:.1f}", row.get("low"), row.get("high")),
        "seeds": seeds,
        "parameters": _format("{:,}", row.get("parameters")),
        "ratio": _format("{:.3f}", row.get("ratio")),
        "train": _format("{:,.0f}", row.get("train_seconds")),
        "steps": _format("{:.2f}", row.get("steps_per_second")),
        "tokens": _format("{:,.0f}", row.get("tokens_per_second")),
        "memory": _format("{:,.1f}", row.get("peak_megabytes")),
        "conditions": _format("{}", row.get("conditions")),
    }
    return [shown[key] for key in COLUMNS]


def _format(pattern: str, *values: Any) -> str:
    return DASH if values[0] is None else pattern.format(*values)
