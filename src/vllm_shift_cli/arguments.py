"""Types of command-line arguments, whose errors say what would work."""

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

# More tokens, requests or GPUs than anybody has.
MOST = 10**9
# Tokens of one prompt or answer, more than any model takes, and requests of one made-up trace: some GB of memory.
MOST_TOKENS = 10**7
MOST_REQUESTS = 10**7

Number = TypeVar("Number", int, float)


def positive(text: str) -> float:
    """A number above 0."""
    return _checked(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def share(text: str) -> float:
    """A number above 0, and at most 1."""
    return _checked(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def count(text: str, most: int = MOST) -> int:
    """A whole number from 1 to ``most``."""
    return _checked(text, int, lambda value: 1 <= value <= most, f"a whole number from 1 to {most:,}")


def seed(text: str) -> int:
    """A whole number from 0 on."""
    return _checked(text, int, lambda value: value >= 0, "a whole number of at least 0")


def counts(text: str) -> tuple[int, int]:
    """``N`` or ``N-M`` tokens of a request: the least and the largest."""
    low, dash, high = text.partition("-")
    least, most = count(low, MOST_TOKENS), count(high if dash else low, MOST_TOKENS)
    if least > most:
        raise argparse.ArgumentTypeError(f"must go from low to high, got {text!r}")
    return least, most


def http_url(text: str) -> str:
    """An address of a server."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"must begin with http:// or https://, got {text!r}")
    return text


def _checked(text: str, kind: Callable[[str], Number], is_right: Callable[[Number], bool], wanted: str) -> Number:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_right(value):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return value
