"""Steps and tokens in each mode, counted in every worker and logged by the first one."""

from threading import Timer

from vllm import envs
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


class StepCounter:
    """Counts steps by mode.

    Args:
        log: write a line every ``VLLM_LOG_STATS_INTERVAL`` seconds (vLLM's own, default 10) in which steps ran.
    """

    def __init__(self, log: bool) -> None:
        self._log = log
        self._timer: Timer | None = None
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self._totals = {"tp_steps": 0, "tp_tokens": 0, "sp_steps": 0, "sp_tokens": 0}
        self._logged = dict(self._totals)

    def count(self, in_sp: bool, num_tokens: int) -> None:
        """Count one step of ``num_tokens`` scheduled tokens."""
        mode = "sp" if in_sp else "tp"
        self._totals[f"{mode}_steps"] += 1
        self._totals[f"{mode}_tokens"] += num_tokens
        if self._log and self._timer is None:
            self._timer = Timer(envs.VLLM_LOG_STATS_INTERVAL, self._write)
            self._timer.daemon = True
            self._timer.start()

    def totals(self) -> dict[str, int]:
        """Steps and tokens per mode since the start or the last reset: ``tp_steps``, ``tp_tokens``, ``sp_...``."""
        return dict(self._totals)

    def close(self) -> None:
        """Stop logging."""
        self._log = False
        if self._timer is not None:
            self._timer.cancel()

    def _write(self) -> None:
        self._timer = None  # first, so that a step counted from here on starts the next one
        now = self.totals()
        new = {name: now[name] - self._logged[name] for name in now}
        self._logged = now
        logger.info(
            "Shift Parallelism: TP mode %d steps (%d tokens), SP mode %d steps (%d tokens); "
            "since start TP %d, SP %d steps.",
            *new.values(),
            now["tp_steps"],
            now["sp_steps"],
        )
