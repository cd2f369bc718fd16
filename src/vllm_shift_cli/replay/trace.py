"""Traces: when requests arrive and how long they are, read from three formats.

- JSON lines of our own: ``{"arrival_s": 0.5, "prompt_tokens": 200, "output_tokens": 50}``
- the CSV format of the public Azure LLM inference traces: ``TIMESTAMP,ContextTokens,GeneratedTokens``
- the JSON lines of the public Mooncake traces: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``
"""

import csv
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_shift_cli.arguments import MOST_TOKENS
from vllm_shift_cli.errors import CommandError

_AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]

# Later than any request, in seconds and in milliseconds.
_LATEST = 10**15


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        arrival: when it is due, in seconds.
        prompt_tokens: length of the prompt.
        output_tokens: length of the answer.
        blocks: ids of the prompt's blocks of 512 tokens; requests that begin with the same ids share a prefix.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


class TraceError(CommandError):
    """Lines of a trace that cannot be read.

    Args:
        name: the trace.
        problems: line number (from 1) and what is wrong with it.
    """

    shown = 20

    def __init__(self, name: str, problems: list[tuple[int, str]]) -> None:
        lines = [f"{name}: {len(problems)} bad line{'s'[: len(problems) > 1]}; nothing has been sent"]
        lines += [f"  line {number}: {problem}" for number, problem in problems[: self.shown]]
        if len(problems) > self.shown:
            lines.append(f"  and {len(problems) - self.shown} more")
        super().__init__("\n".join(lines))
        self.problems = problems


def read_trace(path: Path) -> tuple[str, list[TraceRequest]]:
    """Read a trace; its first line shows the format.

    Returns:
        The name of the format, and the requests as they are in the file.

    Raises:
        CommandError: the file cannot be opened, or holds no requests.
        TraceError: names every line that cannot be read.
    """
    try:
        # Not splitlines(), for which some characters that JSON may have in a string end a line.
        lines = path.read_text(encoding="utf-8-sig", errors="backslashreplace").split("\n")
    except OSError as error:
        raise CommandError(f"cannot read the trace {path}: {error.strerror}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise CommandError(f"the trace {path} is empty")
    first = numbered[0][1]
    if first.lstrip().startswith("{"):
        name, parse = ("mooncake", _mooncake) if "input_length" in first else ("jsonl", _jsonl)
    elif [column.strip() for column in first.split(",")] == _AZURE_COLUMNS:
        name, parse, numbered = "azure", _azure, numbered[1:]
    else:
        raise CommandError(
            f"the trace {path} is in no known format: its first line is {first[:80]!r}; "
            f"expected a JSON object, or the header {','.join(_AZURE_COLUMNS)}"
        )
    requests, problems = [], []
    for number, line in numbered:
        try:
            requests.append(parse(line))
        except (ValueError, csv.Error, RecursionError) as error:
            problems.append((number, str(error)))
    if problems:
        raise TraceError(str(path), problems)
    if not requests:
        raise CommandError(f"the trace {path} holds no requests")
    return name, requests


def write_trace(path: Path, requests: list[TraceRequest]) -> None:
    """Write JSON lines of our own format.

    Raises:
        CommandError: the file cannot be written.
    """
    rows = (
        {"arrival_s": round(r.arrival, 6), "prompt_tokens": r.prompt_tokens, "output_tokens": r.output_tokens}
        for r in requests
    )
    try:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None


def schedule(requests: list[TraceRequest], speed: float = 1.0, most: int | None = None) -> list[TraceRequest]:
    """The requests in the order in which they are due, the first at 0, ``speed`` times as fast.

    Args:
        requests: of a trace, in any order.
        speed: 2 sends twice as many requests a second.
        most: keep only this many, the first ones.
    """
    ordered = sorted(requests, key=lambda request: request.arrival)[:most]
    start = ordered[0].arrival
    return [TraceRequest((r.arrival - start) / speed, r.prompt_tokens, r.output_tokens, r.blocks) for r in ordered]


def _jsonl(line: str) -> TraceRequest:
    row = _json_object(line)
    return TraceRequest(_time(row, "arrival_s"), _count(row, "prompt_tokens"), _count(row, "output_tokens"))


def _mooncake(line: str) -> TraceRequest:
    row = _json_object(line)
    blocks = row.get("hash_ids", [])
    if not isinstance(blocks, list) or any(type(block) is not int or block < 0 for block in blocks):
        raise ValueError(f"hash_ids must be a list of whole numbers, got {str(blocks)[:60]}")
    lengths = _count(row, "input_length"), _count(row, "output_length")
    return TraceRequest(_time(row, "timestamp") / 1000, *lengths, tuple(blocks))


def _azure(line: str) -> TraceRequest:
    (cells,) = csv.reader([line])
    if len(cells) != len(_AZURE_COLUMNS):
        raise ValueError(f"expected {len(_AZURE_COLUMNS)} columns, got {len(cells)}")
    try:
        when = datetime.fromisoformat(cells[0].strip())
    except ValueError:
        raise ValueError(f"TIMESTAMP must be a date and time, got {cells[0]!r}") from None
    counts = [int(cell) if cell.strip().isdecimal() else cell for cell in cells[1:]]
    row = dict(zip(_AZURE_COLUMNS[1:], counts, strict=True))
    arrival = when.replace(tzinfo=when.tzinfo or UTC).timestamp()
    return TraceRequest(arrival, _count(row, "ContextTokens"), _count(row, "GeneratedTokens"))


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {line[:60]}")
    return row


def _count(row: dict[str, Any], name: str) -> int:
    value = _value(row, name)
    if type(value) is not int or not 1 <= value <= MOST_TOKENS:
        raise ValueError(f"{name} must be a whole number from 1 to {MOST_TOKENS:,}, got {value!r:.60}")
    return value


def _time(row: dict[str, Any], name: str) -> float:
    value = _value(row, name)
    if type(value) not in (int, float) or not 0 <= value <= _LATEST:
        raise ValueError(f"{name} must be a number from 0 to {_LATEST:.0e}, got {value!r:.60}")
    return float(value)


def _value(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(f"{name} is missing")
    return row[name]
