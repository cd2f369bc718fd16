"""Asks a Prometheus server each query of the Grafana dashboard next to this file, over its last minutes.

One line a query: its panel, how many series and values it gives, and the least and the largest of these. Exits with 1
where one gives none. Example: queries.py http://localhost:9090
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

DASHBOARD = json.loads((Path(__file__).parent / "vllm-shift.json").read_text())


def ask(url: str, **parameters: Any) -> Any:
    try:
        with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(parameters)}", timeout=30) as response:
            return json.load(response)["data"]
    except (urllib.error.URLError, ValueError) as error:
        sys.exit(f"{url} does not answer as Prometheus does: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the Prometheus server")
    parser.add_argument("minutes", type=float, nargs="?", default=5, help="to look back (default: %(default)s)")
    parser.add_argument(
        "--interval", default="10s", help="that rates are of, four times scrape_interval (default: %(default)s)"
    )
    args = parser.parse_args()
    api, minutes = f"{args.url}/api/v1", args.minutes
    models = ask(f"{api}/label/model_name/values", **{"match[]": "vllm:shift_threshold_tokens"})
    print("models:", *models)
    empty = not models
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            for model in models:
                query = target["expr"].replace("$model_name", model).replace("$__rate_interval", args.interval)
                end = time.time()
                found = ask(f"{api}/query_range", query=query, start=end - 60 * minutes, end=end, step=2)["result"]
                values = [float(value) for series in found for _, value in series["values"]]
                values = [value for value in values if value == value]  # a rate of nothing is none
                empty |= not values
                shown = f"{min(values):.3g} to {max(values):.3g}" if values else "nothing"
                print(f"{panel['title']}: {len(found)} series, {len(values)} values, {shown}")
    return int(empty)


if __name__ == "__main__":
    sys.exit(main())
