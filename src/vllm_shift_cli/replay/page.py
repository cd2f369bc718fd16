"""A report or a comparison as one HTML file that needs nothing else."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_shift_cli.replay.report import LATENCIES, PERCENTILES, Report, warnings


def write_page(title: str, reports: dict[str, Report], picture: Path, path: Path) -> None:
    """Write the page.

    Args:
        title: its heading.
        reports: by name; one or several.
        picture: PNG to embed.
        path: of the page.
    """
    environment = Environment(loader=PackageLoader("vllm_shift_cli.replay"), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"ms": _ms, "number": number}
    page = environment.get_template("report.html").render(
        title=title,
        reports=reports,
        rows=rows(reports),
        warnings={name: warnings(report) for name, report in reports.items()},
        picture=base64.b64encode(picture.read_bytes()).decode(),
    )
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def rows(reports: dict[str, Report]) -> list[tuple[str, list[str]]]:
    """The table of figures: a name with its unit, and one cell for each report."""
    summaries = [report["summary"] for report in reports.values()]

    def row(name: str, cells: list[Any]) -> tuple[str, list[str]]:
        return name, [number(cell) for cell in cells]

    table = [row(title, [summary[name] for summary in summaries]) for name, title in _COUNTS.items()]
    for name, title in LATENCIES.items():
        for key in (*(f"p{percent}" for percent in PERCENTILES), "mean", "max"):
            found = [summary["latencies"][name] for summary in summaries]
            table.append((f"{title}, {key} [ms]", [_ms(values and values[key]) for values in found]))
    for name, title in _MODES.items():
        table.append(row(title, [(summary["modes"] or {}).get(name) for summary in summaries]))
    return table


def number(value: float | int | None) -> str:
    """A number for people."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else number(seconds * 1000)


_COUNTS = {
    "completed": "Complete answers",
    "failed": "Failed requests",
    "never_sent": "Never sent",
    "prompt_tokens": "Prompt tokens",
    "output_tokens": "Output tokens",
    "requests_per_s": "Answers / s",
    "prompt_tokens_per_s": "Prompt tokens / s",
    "output_tokens_per_s": "Output tokens / s",
}

_MODES = {
    "tp_steps": "Steps in TP mode",
    "sp_steps": "Steps in SP mode",
    "tp_tokens": "Tokens in TP mode",
    "sp_tokens": "Tokens in SP mode",
    "mode_changes": "Mode changes",
}
