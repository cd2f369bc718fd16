"""Draws the Grafana dashboard next to this file from a running server, without Grafana or Prometheus.

Reads /metrics every second and evaluates the queries of the dashboard, as far as it uses PromQL: sums, rates (over
5 s), ratios of them and quantiles of histograms.
"""

import argparse
import json
import re
import time
import urllib.request
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = json.loads((Path(__file__).parent / "vllm-shift.json").read_text())
WINDOW = 5
SELECTOR = r"(vllm:\w+)\{([^}]*)\}"
UNITS = {"s": "seconds", "none": "", "percentunit": "share"}

Page = dict[tuple[str, str | None, str | None], float]


def read(url: str) -> Page:
    """Values by name, mode and bucket, summed over the other labels: there is one model."""
    page: Page = {}
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        for family in text_string_to_metric_families(response.read().decode()):
            for sample in family.samples:
                key = sample.name, sample.labels.get("mode"), sample.labels.get("le")
                page[key] = page.get(key, 0.0) + sample.value
    return page


class Series:
    """What was read, and the queries on it; every result has shape [samples]."""

    def __init__(self, times: list[float], pages: list[Page]) -> None:
        self.times, self.pages = np.array(times), pages

    def values(self, name: str, labels: str, bound: str | None = None) -> np.ndarray:
        mode = re.search(r'mode="(\w+)"', labels)
        modes = [mode[1]] if mode else [None, "tp", "sp"]
        return np.array([sum(page.get((name, m, bound), 0.0) for m in modes) for page in self.pages])

    def rate(self, values: np.ndarray) -> np.ndarray:
        rates = np.full(len(values), np.nan)
        rates[WINDOW:] = (values[WINDOW:] - values[:-WINDOW]) / (self.times[WINDOW:] - self.times[:-WINDOW])
        return rates

    def evaluate(self, query: str) -> np.ndarray:
        if found := re.fullmatch(rf"(?:max|sum)\({SELECTOR}\)", query):
            return self.values(*found.groups())
        if found := re.fullmatch(rf"sum\(rate\({SELECTOR}\[\$__rate_interval\]\)\)", query):
            return self.rate(self.values(*found.groups()))
        if found := re.fullmatch(r"(sum\(.*\)) / (sum\(.*\))", query):
            over, under = map(self.evaluate, found.groups())
            return np.divide(over, under, out=np.full(len(over), np.nan), where=under > 0)
        pattern = rf"histogram_quantile\(([\d.]+), sum by \(le\) \(rate\({SELECTOR}\[\$__rate_interval\]\)\)\)"
        if found := re.fullmatch(pattern, query):
            return self.quantile(float(found[1]), found[2], found[3])
        raise ValueError(f"no rule for the query {query}")

    def quantile(self, share: float, name: str, labels: str) -> np.ndarray:
        bounds = sorted({bound for n, _, bound in self.pages[-1] if n == name and bound}, key=float)
        counts = np.array([self.rate(self.values(name, labels, bound)) for bound in bounds])
        edges = np.array([0.0, *map(float, bounds)])
        edges[-1] = edges[-2]  # as Prometheus: what is above the last bound counts as the bound
        result = np.full(len(self.pages), np.nan)
        for i in np.flatnonzero(counts[-1] > 0):
            result[i] = np.interp(share * counts[-1, i], [0.0, *counts[:, i]], edges)
        return result


def draw(series: Series, path: str) -> None:
    columns, unit_height = 24, 0.38
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in DASHBOARD["panels"])
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
    figure = plt.figure(figsize=(13, height * unit_height), layout="constrained")
    grid = figure.add_gridspec(height, columns)
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        axes = figure.add_subplot(grid[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]])
        axes.set_title(panel["title"], loc="left", fontweight="bold", fontsize=10)
        if panel["type"] == "stat":
            axes.axis("off")
            value = series.evaluate(panel["targets"][0]["expr"])[-1]
            axes.text(
                0.5, 0.45, f"{value:,.0f} tokens", fontsize=20, ha="center", va="center", transform=axes.transAxes
            )
            continue
        draw_lines(axes, panel, series)
    figure.supxlabel("seconds", fontsize=9)
    figure.savefig(path, dpi=110)


def draw_lines(axes: plt.Axes, panel: dict, series: Series) -> None:
    fixed = {o["matcher"]["options"].strip("/"): o["properties"][0]["value"]["fixedColor"]
             for o in panel["fieldConfig"]["overrides"]}  # fmt: skip
    others = iter(["#444444", "#009E73", "#CC79A7", "#56B4E9"])
    defaults = panel["fieldConfig"]["defaults"]
    stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    below = np.zeros(len(series.times))
    for target in panel["targets"]:
        label, values = target["legendFormat"], series.evaluate(target["expr"])
        color = next((c for pattern, c in fixed.items() if re.match(pattern, label)), None) or next(others)
        if stacked:
            axes.fill_between(series.times, below, below + values, color=color, alpha=0.6, label=label, linewidth=0)
            below = below + values
        else:
            style = ":" if "99 %" in label else "--" if label == "threshold" else "-"
            axes.plot(series.times, values, style, color=color, label=label)
    axes.set_ylim(0, defaults.get("max"))
    axes.set_xlim(0, series.times[-1])
    axes.set_ylabel(UNITS[defaults["unit"]])
    if defaults["unit"] == "percentunit":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the server")
    parser.add_argument("seconds", type=float, help="to watch it")
    parser.add_argument("output", help="the picture, PNG")
    args = parser.parse_args()
    began, times, pages = time.monotonic(), [], []
    while (now := time.monotonic() - began) < args.seconds:
        times.append(now)
        pages.append(read(args.url))
        time.sleep(max(0.0, len(times) - (time.monotonic() - began)))
    draw(Series(times, pages), args.output)


if __name__ == "__main__":
    main()
