"""What ``vllm_cases.py`` puts into the processes of vLLM's own tests, which it leaves as they are.

As a plugin of vLLM, in each process of an engine, it gives every engine Shift Parallelism and notes the mode of each
step. As a plugin of pytest it writes how each test ended, with the steps that ran meanwhile.
"""

import functools
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

SP = 2
# Below the prompts of these tests, and above the decoding of a few requests: so both modes run.
THRESHOLD = 4

# Variables, as the processes of an engine get nothing else from the command. The first two name files.
RESULTS, STEPS, EAGER, HOW = "VLLM_CASES_RESULTS", "VLLM_CASES_STEPS", "VLLM_CASES_EAGER", "VLLM_CASES_HOW"

# Values of the last: as the tests say; on as many ranks as with Shift Parallelism, which rounds like it; and with it.
STOCK, STOCK_TP, SHIFT = "stock", "stock-tp", "shift"

# Of the test that runs.
outcome: dict[str, str] = {}


def register() -> None:
    """Entry point ``vllm.general_plugins``: change the engine arguments, and note the steps."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_shift import plugin
    from vllm_shift.stats import StepCounter

    plugin.register()  # before what follows, whichever entry point vLLM loads first
    create, step = EngineArgs.create_engine_config, StepCounter.step

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.enforce_eager = self.enforce_eager or EAGER in os.environ
        if os.environ[HOW] == STOCK_TP:
            self.tensor_parallel_size = SP
        if os.environ[HOW] == SHIFT:
            self.ulysses_sequence_parallel_size, self.enable_shift_parallel = SP, True
            self.shift_parallel_threshold = THRESHOLD
        if os.environ[HOW] != STOCK and self.distributed_executor_backend == "uni":  # of one rank
            self.distributed_executor_backend = "mp"
        return create(self, *args, **kwargs)

    @functools.wraps(step)
    def noted_step(self: Any, in_sp: bool, num_tokens: int) -> Any:
        with open(os.environ[STEPS], "a") as steps:
            steps.write("s" if in_sp else "t")
        return step(self, in_sp, num_tokens)

    EngineArgs.create_engine_config, StepCounter.step = create_engine_config, noted_step


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of setup, call and teardown, the first that did not pass counts. A server that does not start is an error."""
    if outcome.get("outcome", "passed") == "passed":
        ended = "error" if report.failed and report.when != "call" else report.outcome
        outcome.update(outcome=ended, why=report.longreprtext[-500:])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    outcome.clear()
    before = _steps()
    done = yield
    tp, sp = (now - then for now, then in zip(_steps(), before, strict=True))
    with open(os.environ[RESULTS], "a") as results:
        results.write(json.dumps({"case": item.nodeid, "tp": tp, "sp": sp} | outcome) + "\n")
    return done


def _steps() -> tuple[int, int]:
    """Steps in TP mode and in SP mode; each rank has noted all of them."""
    text = Path(os.environ[STEPS]).read_text()
    return text.count("t") // SP, text.count("s") // SP
