"""The pictures of a report and of a comparison."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vllm_shift_cli.replay.report import LATENCIES, Report, in_flight, latencies, throughput

# Blue and orange of a palette that colour-blind readers can tell apart (Okabe and Ito).
TP, SP, GREY, RED = "#0072B2", "#E69F00", "#666666", "#D55E00"
PROMPT, OUTPUT = "#CC79A7", "#009E73"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    # Names of traces and models are no formulas.
    "text.parse_math": False,
}


def plot_report(report: Report, path: Path) -> None:
    """Traffic, throughput and latency over time, and the server's mode under them, as PNG."""
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(
            5, 1, figsize=(11, 12), sharex=True, height_ratios=[1, 1.2, 1.4, 0.8, 0.8], layout="constrained"
        )
        figure.suptitle(_title(report), x=0.01, ha="left", fontsize=13, fontweight="bold")
        _requests(axes[0], report)
        _throughput(axes[1], report)
        _latency(axes[2], report)
        _mode(axes[3], report, "steps", "Steps by mode")
        _mode(axes[4], report, "tokens", "Tokens by mode")
        axes[4].set_xlabel("Time since the first request [s]")
        axes[4].set_xlim(0, report["seconds"])
        _save(figure, path)


def plot_comparison(reports: dict[str, Report], path: Path) -> None:
    """Latency distributions and throughput of several reports in one PNG."""
    with mpl.rc_context(_STYLE):
        rows = 3 + len(reports)
        figure = plt.figure(figsize=(12, 7.2 + 0.75 * len(reports)), layout="constrained")
        grid = figure.add_gridspec(rows, 3, height_ratios=[3.2, 0.25, 2.4, *[0.9] * len(reports)])
        for column, (name, title) in enumerate(LATENCIES.items()):
            axes = figure.add_subplot(grid[0, column])
            for color, (label, report) in zip(_colors(reports), reports.items(), strict=True):
                values = np.sort(latencies(report, name)) * 1000
                share = np.arange(1, len(values) + 1) / max(len(values), 1) * 100
                # A legend leaves out labels that begin with "_".
                axes.step(values, share, color=color, label=f" {_shown(label)}")
            axes.set_title(title)
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
            axes.set_xlabel("ms (logarithmic)")
            axes.set_ylim(0, 101)
            if not column:
                axes.set_ylabel("Share of answers within [%]")
        handles, labels = axes.get_legend_handles_labels()
        legend = figure.add_subplot(grid[1, :])
        legend.axis("off")
        legend.legend(handles, labels, loc="center", ncols=4)
        longest = max(report["seconds"] for report in reports.values())
        axes = figure.add_subplot(grid[2, :])
        for color, report in zip(_colors(reports), reports.values(), strict=True):
            bins = throughput(report)
            axes.stairs(bins["output"], bins["edges"], color=color, linewidth=1.5)
        axes.set_title("Output throughput")
        axes.set_ylabel("tokens / s")
        axes.set_xlim(0, longest)
        axes.set_ylim(bottom=0)
        for number, (label, report) in enumerate(reports.items()):
            axes = figure.add_subplot(grid[3 + number, :])
            _mode(axes, report, "tokens", f"Tokens by mode: {_shown(label)}")
            axes.set_xlim(0, longest)
        axes.set_xlabel("Time since the first request [s]")
        _save(figure, path)


def _title(report: Report) -> str:
    settings, summary = report["settings"], report["summary"]
    title = _shown(
        f"{settings['trace']} on {settings['model']}: {summary['completed']} of {report['planned']} answered"
    )
    return title + (" (interrupted)" if report["interrupted"] else "")


def _shown(name: str) -> str:
    """A name as matplotlib takes it: bytes that are no UTF-8 reach Python as surrogates, which have no glyph."""
    return name.encode(errors="replace").decode()


def _requests(axes: Axes, report: Report) -> None:
    bins = throughput(report)
    axes.stairs(bins["sent"], bins["edges"], fill=True, color=GREY, alpha=0.35, label="sent [requests / s]")
    times, count = in_flight(report)
    axes.step(times, count, where="post", color="black", linewidth=1.2, label="in flight [requests]")
    axes.set_title("Requests")
    axes.set_ylabel("requests (/ s)")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _throughput(axes: Axes, report: Report) -> None:
    bins = throughput(report)
    axes.stairs(bins["prompt"], bins["edges"], color=PROMPT, linewidth=1.5, label="prompt")
    axes.stairs(bins["output"], bins["edges"], color=OUTPUT, linewidth=1.8, label="output")
    axes.set_title("Throughput of complete answers")
    axes.set_ylabel("tokens / s")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _latency(axes: Axes, report: Report) -> None:
    done = [request for request in report["requests"] if request["error"] is None]
    sent = [request["sent"] for request in done]
    size = float(np.clip(3000 / max(len(done), 1), 4, 30))
    for name, color, marker in (("completion", GREY, "s"), ("ttft", TP, "o")):
        values = latencies(report, name) * 1000
        axes.scatter(sent, values, s=size, color=color, marker=marker, alpha=0.7, linewidths=0,
                     label=LATENCIES[name], rasterized=True)  # fmt: skip
    failed = [request["sent"] for request in report["requests"] if request["error"] is not None]
    if failed:
        axes.scatter(failed, [0.96] * len(failed), marker="x", color=RED, label="failed", zorder=3,
                     transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_title("Latency of each request, at the time it was sent")
    axes.set_ylabel("ms (logarithmic)")
    if done:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    _legend(axes)


def _mode(axes: Axes, report: Report, what: str, title: str) -> None:
    samples: list[dict[str, Any]] = report["mode_samples"]
    axes.set_title(title)
    axes.set_ylabel("share [%]")
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100])
    if len(samples) < 2:
        reason = next(iter(report["mode_problems"]), "no samples")
        axes.text(0.5, 0.5, f"not known: {reason}", ha="center", va="center", transform=axes.transAxes, color=GREY,
                  wrap=True)  # fmt: skip
        return
    times = np.array([sample["time"] for sample in samples])
    counts = np.array([[sample[f"tp_{what}"], sample[f"sp_{what}"]] for sample in samples])
    # Where the server has restarted, counts fall.
    taken = np.maximum(np.diff(counts, axis=0), 0)
    share = np.divide(taken * 100, taken.sum(1, keepdims=True), where=taken.sum(1, keepdims=True) > 0,
                      out=np.zeros(taken.shape))  # fmt: skip
    threshold = samples[-1]["threshold"]
    axes.stairs(share[:, 0], times, fill=True, color=TP, label=f"TP mode (steps of up to {threshold} tokens)")
    axes.stairs(share.sum(1), times, baseline=share[:, 0], fill=True, color=SP, label="SP mode (larger steps)")
    _legend(axes)


def _plain_ticks(axis: Axis) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.01), ncols=4, fontsize=9, borderaxespad=0)


def _colors(reports: dict[str, Report]) -> list[str]:
    return [SERIES[number % len(SERIES)] for number in range(len(reports))]


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
