"""The command line: ``vllm-shift COMMAND``."""

import argparse
import io
import sys
from collections.abc import Sequence

from vllm_shift_cli import plan
from vllm_shift_cli.errors import CommandError
from vllm_shift_cli.replay import commands as replay

# Each of these adds its subcommands. They import what they need when they run, so that --help needs nothing.
_COMMANDS = (replay.add_parsers, plan.add_parsers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``vllm-shift``; by default those of this process.

    Returns:
        The exit status of the command; 2 for input that it cannot use, and for files that it cannot write.
    """
    for stream in (sys.stdout, sys.stderr):
        # A name that a terminal cannot show must not end the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="vllm-shift", description="Tools around servers with Shift Parallelism.")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add_parsers in _COMMANDS:
        add_parsers(subparsers)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except CommandError as error:
        parser.exit(2, f"vllm-shift: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "vllm-shift: interrupted\n")
    except ModuleNotFoundError as error:
        parser.exit(2, f"vllm-shift: {error.name} is not installed; try: pip install 'vllm-shift[{args.extra}]'\n")
    return status
