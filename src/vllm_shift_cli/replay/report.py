"""The arithmetic of a report, and the JSON file that holds it."""

import json
import os
import re
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray

from vllm_shift_cli.errors import CommandError
from vllm_shift_cli.replay.client import Outcome
from vllm_shift_cli.replay.modes import ModeSample
from vllm_shift_cli.replay.run import Replay

Report = dict[str, Any]

FORMAT = "vllm-shift replay report 1"

# What a report has beside its format, see ``make_report``.
_PARTS = (
    "settings", "interrupted", "planned", "seconds", "requests", "mode_samples", "mode_problems", "summary"
)  # fmt: skip

PERCENTILES = (50, 90, 99)

LATENCIES = {
    "ttft": "Time to first token (TTFT)",
    "tpot": "Time per output token (TPOT)",
    "completion": "Completion",
}

# Above this, answers were measured under less load than the trace asks for.
LATE_S = 0.1


def make_report(replay: Replay, planned: int, settings: dict[str, Any]) -> Report:
    """Everything known of a replay, as JSON takes it.

    Args:
        replay: what has been seen.
        planned: requests of the schedule, sent or not.
        settings: how it was run; shown as they are.
    """
    report = {
        "format": FORMAT,
        "settings": settings | {"model": replay.model},
        "interrupted": replay.interrupted,
        "planned": planned,
        "seconds": replay.seconds,
        "requests": [asdict(outcome) for outcome in replay.outcomes],
        "mode_samples": [asdict(sample) for sample in replay.samples],
        "mode_problems": replay.sample_problems,
    }
    return report | {"summary": summarize(report)}


def summarize(report: Report) -> dict[str, Any]:
    """Counts, percentiles and throughput of a report; of complete answers only, unless a name says otherwise.

    Latencies count from the moment a request was sent, in seconds; percentiles are interpolated linearly. TPOT is the
    time from the first to the last token, divided by the tokens after the first. Throughput is over the time from the
    first request to the last token of an answer.
    """
    requests = report["requests"]
    done = [request for request in requests if request["error"] is None]
    errors = [request["error"] for request in requests if request["error"] is not None]
    end = max((request["last"] for request in done), default=0.0)
    span = end - min((request["sent"] for request in requests), default=0.0)
    tokens = {name: sum(request[f"got_{name}_tokens"] for request in done) for name in ("prompt", "output")}
    return {
        "sent": len(requests),
        "completed": len(done),
        "failed": len(errors),
        "never_sent": report["planned"] - len(requests),
        "failures": _reasons(errors),
        "other_length": sum(_has_other_length(request) for request in done),
        "prompt_tokens": tokens["prompt"],
        "output_tokens": tokens["output"],
        "requests_per_s": len(done) / span if done else None,
        "prompt_tokens_per_s": tokens["prompt"] / span if done else None,
        "output_tokens_per_s": tokens["output"] / span if done else None,
        "latencies": {name: _percentiles(latencies(report, name)) for name in LATENCIES},
        "lateness": _percentiles(np.array([request["sent"] - request["due"] for request in requests])),
        "modes": _modes(report["mode_samples"]),
    }


def latencies(report: Report, name: str) -> NDArray[np.float64]:
    """Seconds of each complete answer; TPOT without those of a single token."""
    done = [request for request in report["requests"] if request["error"] is None]
    if name == "ttft":
        found = [request["first"] - request["sent"] for request in done]
    elif name == "completion":
        found = [request["last"] - request["sent"] for request in done]
    else:
        several = [request for request in done if request["got_output_tokens"] > 1]
        found = [(request["last"] - request["first"]) / (request["got_output_tokens"] - 1) for request in several]
    return np.array(found)


def bin_width(seconds: float) -> float:
    """A round width, in seconds, that cuts a replay into at most 100 bins."""
    return next((width for width in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 600) if seconds / width <= 100), 3600)


def throughput(report: Report) -> dict[str, NDArray[np.float64]]:
    """What came and went in bins of ``bin_width`` seconds.

    Returns:
        ``edges`` of the bins, in seconds, shape [bins + 1]; ``output`` tokens, ``prompt`` tokens and ``sent`` requests
        a second, shape [bins]. Prompt tokens count when the first token of the answer comes. The tokens of an answer
        are taken as evenly spread from the first to the last.
    """
    width = bin_width(report["seconds"])
    edges = np.arange(0, report["seconds"] + width, width)
    done = [request for request in report["requests"] if request["error"] is None]
    spread = [np.linspace(r["first"], r["last"], r["got_output_tokens"]) for r in done]
    prompts = np.histogram([r["first"] for r in done], edges, weights=[r["got_prompt_tokens"] for r in done])[0]
    return {
        "edges": edges,
        "output": np.histogram(np.concatenate([*spread, np.zeros(0)]), edges)[0] / width,
        "prompt": prompts / width,
        "sent": np.histogram([r["sent"] for r in report["requests"]], edges)[0] / width,
    }


def in_flight(report: Report) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """When the number of requests in flight changes, in seconds, and to what."""
    requests = report["requests"]
    times = np.array([request["ended"] for request in requests] + [request["sent"] for request in requests])
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(np.repeat([-1, 1], len(requests))[order])


def save(report: Report, path: Path) -> None:
    """Write a report as JSON; an older one stays as it is until the new one is whole.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(report, allow_nan=False) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> Report:
    """Read a report.

    Raises:
        CommandError: the file cannot be read, or is no whole report of this version.
    """
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path} is not JSON: {error}") from None
    found = report.get("format") if isinstance(report, dict) else None
    if found != FORMAT:
        raise CommandError(f"{path} is not a report of `vllm-shift replay`: its format is {found!r}, not {FORMAT!r}")
    if missing := sorted(set(_PARTS) - set(report)):
        raise CommandError(f"{path} is not a whole report: {', '.join(missing)} is missing")
    try:
        _check_types(report)
        report["summary"] = summarize(report)
    except Exception as error:
        raise CommandError(f"{path} is a damaged report: {type(error).__name__}: {error}") from None
    return report  # type: ignore[no-any-return]


def _check_types(report: Report) -> None:
    """Look at every type that the rest relies on.

    Raises:
        TypeError, KeyError: a part is not as ``make_report`` makes it.
    """
    counts: dict[str, Any] = {f"count of {problem!r}": count for problem, count in report["mode_problems"].items()}
    _check_row(report["settings"], {"trace": str, "model": str})
    _check_row(report, {"interrupted": bool, "planned": int, "seconds": float})
    _check_row(counts, dict.fromkeys(counts, int))
    for name, kind in (("requests", Outcome), ("mode_samples", ModeSample)):
        for row in report[name]:
            _check_row(row, get_type_hints(kind))


def _check_row(row: dict[str, Any], types: dict[str, Any]) -> None:
    for name, kind in types.items():
        if not isinstance(row[name], kind):
            raise TypeError(f"{name} is {row[name]!r:.60}")


def warnings(report: Report) -> list[str]:
    """What a reader must know before believing the numbers."""
    summary, found = report["summary"], []
    if report["interrupted"]:
        found.append(f"Interrupted: {summary['never_sent']} of {report['planned']} requests were never sent.")
    if summary["failed"]:
        found.append(
            f"{summary['failed']} of {summary['sent']} requests have no complete answer; they are in no figure."
        )
    if summary["other_length"]:
        found.append(
            f"{summary['other_length']} answers or prompts have another number of tokens than the trace: the server "
            "does not take token ids, min_tokens or ignore_eos as vLLM does."
        )
    late = summary["lateness"]
    if late and late["p99"] > LATE_S:
        found.append(
            f"This client sent late: 99 % of the requests within {late['p99']:.2f} s of when they were due, the last "
            f"after {late['max']:.2f} s. The server had less load than the trace asks for."
        )
    if any(later["tp_steps"] + later["sp_steps"] < earlier["tp_steps"] + earlier["sp_steps"]
           for earlier, later in pairwise(report["mode_samples"])):  # fmt: skip
        found.append("The server's count of steps fell: it has restarted, and steps around that are not counted.")
    found += [f"Mode samples: {count} x {problem}" for problem, count in report["mode_problems"].items()]
    return found


def _reasons(errors: list[str]) -> list[dict[str, Any]]:
    """Errors that differ in numbers only are one reason, shown by its first example."""
    groups: dict[str, list[str]] = {}
    for error in errors:
        groups.setdefault(re.sub(r"\d+", "N", error), []).append(error)
    rows = [{"reason": group[0], "count": len(group)} for group in groups.values()]
    return sorted(rows, key=lambda row: -int(row["count"]))


def _has_other_length(request: dict[str, Any]) -> bool:
    return any(request[f"got_{name}_tokens"] != request[f"{name}_tokens"] for name in ("prompt", "output"))


def _percentiles(values: NDArray[np.float64]) -> dict[str, float] | None:
    if not len(values):
        return None
    found = {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}
    return found | {"mean": float(values.mean()), "max": float(values.max())}


def _modes(samples: list[dict[str, Any]]) -> dict[str, int] | None:
    """Steps and tokens by mode from the first sample to the last; a restarted server counts from 0 again."""
    if len(samples) < 2:
        return None
    names = ("tp_steps", "sp_steps", "tp_tokens", "sp_tokens", "mode_changes")
    return {name: sum(max(0, later[name] - earlier[name]) for earlier, later in pairwise(samples)) for name in names}
