"""The subcommands ``replay``, ``compare`` and ``trace``."""

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_shift_cli.arguments import MOST_REQUESTS, count, counts, http_url, positive, seed
from vllm_shift_cli.errors import CommandError

if TYPE_CHECKING:
    from vllm_shift_cli.replay.report import Report
    from vllm_shift_cli.replay.run import Options, Replay
    from vllm_shift_cli.replay.trace import TraceRequest

_EXTRA = "replay"


def add_parsers(subparsers: Any) -> None:
    """Add the subcommands to the command line."""
    _add_replay(subparsers)
    _add_compare(subparsers)
    _add_trace(subparsers)


def _add_replay(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "replay",
        help="send the requests of a trace to a server, and report",
        description="Send the requests of a trace to an OpenAI-compatible server, each when it is due, and write a "
        "report: PREFIX.json, PREFIX.png and PREFIX.html. Ctrl-C or SIGTERM ends it early and writes what there is.",
        epilog="Prompts are token ids and answers have the exact length of the trace (ignore_eos, min_tokens), as vLLM "
        "takes them. Another server refuses such requests, which the report lists as failed, or answers in other "
        "lengths, which the report counts. Exit status: 0 all answered, 1 some not, 2 bad input or a file that "
        "cannot be written, 130 interrupted.",
    )
    parser.add_argument("trace", type=Path, help="JSON lines, Azure LLM inference CSV or Mooncake JSON lines")
    parser.add_argument("--url", type=http_url, default="http://localhost:8000",
                        help="of the server (default: %(default)s)")  # fmt: skip
    parser.add_argument("--model", help="to ask for (default: the first that the server has)")
    parser.add_argument("--output", type=Path, default=Path("replay"), metavar="PREFIX",
                        help="of the files to write (default: %(default)s)")  # fmt: skip
    parser.add_argument("--speed", type=positive, default=1.0, help="2 sends twice as fast (default: %(default)s)")
    parser.add_argument("--max-requests", type=count, metavar="N", help="only the first N")
    parser.add_argument("--seed", type=seed, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--timeout", type=positive, default=600.0, metavar="SECONDS",
                        help="for one request (default: %(default)s)")  # fmt: skip
    parser.add_argument("--interval", type=positive, default=1.0, metavar="SECONDS",
                        help="between two looks at the server's mode (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=_replay, extra=_EXTRA)


def _add_compare(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="put reports side by side",
        description="Put reports of `vllm-shift replay` side by side: a table here, PREFIX.png and PREFIX.html.",
    )
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT.json")
    parser.add_argument("--output", type=Path, default=Path("compare"), metavar="PREFIX",
                        help="of the files to write (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=_compare, extra=_EXTRA)


def _add_trace(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "trace", help="make up a trace", description="Make up a trace of requests that arrive at random."
    )
    kinds = parser.add_subparsers(title="kinds", required=True, metavar="KIND", dest="kind")
    for kind, text in (
        ("steady", "the same rate all the time"),
        ("bursty", "a base rate, and bursts at a higher one"),
        ("diurnal", "a rate that rises and falls like that of a day"),
    ):
        sub = kinds.add_parser(kind, help=text, description=f"A trace with {text}.")
        sub.add_argument("output", type=Path, metavar="FILE", help="to write, JSON lines")
        sub.add_argument("--rate", type=positive, required=True, help="requests a second; the least, if it varies")
        if kind != "steady":
            sub.add_argument("--peak", type=positive, required=True, help="most requests a second")
            sub.add_argument("--period", type=positive, required=True, metavar="SECONDS", help="from peak to peak")
        if kind == "bursty":
            sub.add_argument("--burst", type=positive, required=True, metavar="SECONDS", help="length of a burst")
        sub.add_argument("--duration", type=positive, required=True, metavar="SECONDS")
        sub.add_argument("--prompt-tokens", type=counts, default=(512, 512), metavar="N[-M]", help="(default: 512)")
        sub.add_argument("--output-tokens", type=counts, default=(128, 128), metavar="N[-M]", help="(default: 128)")
        sub.add_argument("--seed", type=seed, default=0, help="the same seed gives the same trace (default: 0)")
    parser.set_defaults(run=_trace, extra=_EXTRA)


def _replay(args: argparse.Namespace) -> int:
    from rich.console import Console

    from vllm_shift_cli.replay.report import warnings
    from vllm_shift_cli.replay.run import Options
    from vllm_shift_cli.replay.trace import read_trace, schedule

    trace_format, requests = read_trace(args.trace)
    plan = schedule(requests, args.speed, args.max_requests)
    _check_output(args.output, ".json", ".png", ".html")
    url = args.url.rstrip("/").removesuffix("/v1")
    options = Options(url, args.model, args.seed, args.timeout, os.getenv("OPENAI_API_KEY"), args.interval)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    settings = {
        "trace": args.trace.name, "trace format": trace_format, "requests in the trace": len(requests),
        "url": url, "speed": args.speed, "max requests": args.max_requests, "seed": args.seed,
        "timeout [s]": args.timeout, "started": started,
    }  # fmt: skip
    report, problem = _run_and_save(plan, options, settings, _with_suffix(args.output, ".json"))
    console = Console(highlight=False)
    _show(console, {args.output.name: report})
    for line in warnings(report):
        console.print(line, style="yellow", markup=False)
    for row in report["summary"]["failures"]:
        console.print(f"  {row['count']} x {row['reason']}", style="red", markup=False)
    if problem:
        raise CommandError(f"cannot write {args.output}.json: {problem.strerror or problem}")
    kept = f"{args.output}.json is written, "
    _write_pictures(f"Replay of {args.trace.name}", {args.output.name: report}, args.output, kept)
    console.print(f"Written: {args.output}.json, .png, .html", markup=False)
    if report["interrupted"]:
        return 130
    return 1 if report["summary"]["failed"] else 0


def _run_and_save(
    plan: "list[TraceRequest]", options: "Options", settings: dict[str, Any], path: Path
) -> "tuple[Report, OSError | None]":
    """Replay, and save the report.

    Returns:
        The report, and why it could not be saved.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM came before anything was sent.
    """
    import asyncio
    import signal

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vllm_shift_cli.replay.report import make_report, save
    from vllm_shift_cli.replay.run import replay

    _raise_file_limit()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(plan))

        def show(state: "Replay") -> None:
            description = f"{len(state.outcomes) - state.ended} in flight, {state.failed} failed"
            progress.update(task, completed=state.ended, description=description)

        async def run() -> "tuple[Report, OSError | None]":
            loop, this = asyncio.get_running_loop(), asyncio.current_task()
            assert this is not None
            for number in (signal.SIGINT, signal.SIGTERM):
                # A shell lets what it starts in the background ignore Ctrl-C.
                if signal.getsignal(number) != signal.SIG_IGN:
                    loop.add_signal_handler(number, this.cancel)
            report = make_report(await replay(plan, options, show), len(plan), settings)
            # First what cannot be had again; here, because these handlers interrupt only what awaits.
            try:
                save(report, path)
            except OSError as error:
                return report, error
            return report, None

        try:
            return asyncio.run(run())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


def _compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from vllm_shift_cli.replay.report import load, warnings

    if len(set(map(os.path.realpath, args.reports))) < len(args.reports):
        raise CommandError("the same report is given twice")
    names = [path.name.removesuffix(".json") for path in args.reports]
    if len(set(names)) < len(names):
        names = [str(path) for path in args.reports]
    reports = {name: load(path) for name, path in zip(names, args.reports, strict=True)}
    _check_output(args.output, ".png", ".html")
    console = Console(highlight=False)
    _show(console, reports)
    for name, report in reports.items():
        for line in warnings(report):
            console.print(f"{name}: {line}", style="yellow", markup=False)
    _write_pictures("Comparison of replays", reports, args.output)
    console.print(f"Written: {args.output}.png, .html", markup=False)
    return 0


def _trace(args: argparse.Namespace) -> int:
    from vllm_shift_cli.replay.generate import bursty, diurnal, generate, steady
    from vllm_shift_cli.replay.trace import write_trace

    if args.kind == "steady":
        rate, most = steady(args.rate), args.rate
    elif args.peak < args.rate:
        raise CommandError(f"--peak is {args.peak:g}, below --rate {args.rate:g}; it must be at least that")
    elif args.kind == "bursty":
        if args.burst > args.period:
            raise CommandError(f"--burst is {args.burst:g} s, longer than --period {args.period:g} s")
        rate, most = bursty(args.rate, args.peak, args.period, args.burst), args.peak
    else:
        rate, most = diurnal(args.rate, args.peak, args.period), args.peak
    if (expected := most * args.duration) > MOST_REQUESTS:
        raise CommandError(f"this makes some {expected:.0e} requests, more than {MOST_REQUESTS:,}; lower the rate")
    requests = generate(rate, most, args.duration, args.prompt_tokens, args.output_tokens, args.seed)
    if not requests:
        raise CommandError("no request arrives in this time; raise --rate or --duration")
    write_trace(args.output, requests)
    return 0


def _write_pictures(title: str, reports: "dict[str, Report]", output: Path, kept: str = "") -> None:
    """Write PREFIX.png and PREFIX.html.

    Raises:
        CommandError: they cannot be made; begins with ``kept``.
    """
    from vllm_shift_cli.replay.page import write_page
    from vllm_shift_cli.replay.plot import plot_comparison, plot_report

    picture = _with_suffix(output, ".png")
    try:
        if len(reports) == 1:
            plot_report(next(iter(reports.values())), picture)
        else:
            plot_comparison(reports, picture)
        write_page(title, reports, picture, _with_suffix(output, ".html"))
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise CommandError(f"{kept}no picture: {type(error).__name__}: {first_line}") from None


def _show(console: Any, reports: "dict[str, Report]") -> None:
    from rich.table import Column, Table
    from rich.text import Text

    from vllm_shift_cli.replay.page import rows

    # Text takes names as they are, without markup.
    table = Table("", *(Column(Text(name), justify="right") for name in reports))
    for name, cells in rows(reports):
        table.add_row(Text(name), *cells)
    console.print(table)


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _check_output(prefix: Path, *suffixes: str) -> None:
    """Better now than after an hour of traffic.

    Raises:
        CommandError: the files cannot be written there.
    """
    if prefix.name in ("", "..") or prefix.is_dir():
        raise CommandError(f"--output {prefix}: this is a folder; for files in it, try {prefix / 'replay'}")
    if not (prefix.parent.is_dir() and os.access(prefix.parent, os.W_OK)):
        raise CommandError(f"--output {prefix}: cannot write in the folder {prefix.parent}")
    for path in (_with_suffix(prefix, suffix) for suffix in suffixes):
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise CommandError(f"--output {prefix}: cannot write {path}")


def _raise_file_limit() -> None:
    """As many open connections as the system lets this user have."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
