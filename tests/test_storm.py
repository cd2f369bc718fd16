"""Modes drawn at random, step by step: outputs stay those of stock vLLM, and a planted bug is found and shrunk."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from storm import MAX_TOKENS, PROMPTS, Storm, StormError, random_schedule

pytestmark = pytest.mark.engine

REQUESTS = st.fixed_dictionaries(
    {
        "arrives": st.integers(0, 40),
        "prompt": st.integers(0, len(PROMPTS) - 1),
        "max_tokens": st.integers(1, MAX_TOKENS),
        "aborts_after": st.none() | st.integers(0, 20),
    }
)
SCHEDULES = st.fixed_dictionaries(
    {
        "requests": st.lists(REQUESTS, min_size=1, max_size=16),
        # Repeated from the beginning when a schedule has more steps.
        "modes": st.lists(st.booleans(), min_size=1, max_size=12),
    }
)


def any_schedule(examples: int) -> Any:
    """Settings of a search that is the same every time; engines are slow, so without deadlines."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


@pytest.fixture(scope="module")
def storm(tmp_path_factory):
    with Storm(2, 1, tmp_path_factory.mktemp("storm")) as storm:
        yield storm


def test_a_storm(storm):
    total = storm.run(random_schedule(seed=1, steps=600)) + storm.run(random_schedule(seed=2, steps=600))
    assert total["steps"] > 800
    assert 0.4 < total["SP steps"] / total["steps"] < 0.6
    for event in ("mode changes", "resumed after preemption", "prefix cache hits", "chunked prefills"):
        assert total[event] > 10, event
    assert total["finished requests"] < total["requests"]


def test_schedules_of_any_kind(storm):
    @any_schedule(examples=8)
    @given(SCHEDULES)
    def check(schedule):
        storm.run(schedule)

    check()


def test_a_planted_bug_is_found_and_shrunk(storm):
    """The bug needs an SP step with a token on the last rank, right after a TP step."""
    failing: list[dict[str, Any]] = []

    @any_schedule(examples=100)
    @given(SCHEDULES)
    def check(schedule):
        try:
            storm.run(schedule | {"bug": True})
        except StormError:
            failing.append(schedule)
            raise

    with pytest.raises(StormError, match="expected"):
        check()
    # The last that failed is the smallest.
    assert len(failing) > 2
    smallest = failing[-1]
    assert len(smallest["requests"]) <= 2
    assert smallest["modes"] == [False, True]
    assert all(request["aborts_after"] is None for request in smallest["requests"])


def test_a_rank_that_diverges_ends_the_engine_on_every_rank(storm):
    """The last test here: the engine is gone after it."""
    request = {"arrives": 0, "prompt": 0, "max_tokens": 9, "aborts_after": None}
    views = r"rank 0: step (\d+) in TP mode, 1 tokens .*; rank 1: step \1 in SP mode, 1 tokens .*threshold 0"
    with pytest.raises(StormError, match=views) as raised:
        storm.run({"requests": [request], "modes": [False], "diverges_at": 6})
    ends = [
        line for line in str(raised.value).splitlines() if line.startswith("RuntimeError: Shift Parallelism: the ranks")
    ]
    assert len(ends) == 2
