"""The settings of Shift Parallelism, and how they travel inside vLLM's own config."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from vllm_shift.dims import ParallelDims

# The key under VllmConfig.additional_config, vLLM's dict for plugins.
CONFIG_KEY = "shift_parallel"
# There, too: what ``code_hash`` gives, because vLLM's compile cache takes account of that dict.
CODE_KEY = "shift_parallel_code"

DEFAULT_THRESHOLD = 256

# No step has more tokens, and the counters and collectives that carry a threshold hold it.
MAX_THRESHOLD = 2**31 - 1

# In place of a number of tokens: the engine measures it at start-up.
AUTO = "auto"


@dataclass(frozen=True)
class ShiftConfig:
    """Settings of one engine; the field names are those of the flags, where there is one.

    Attributes:
        tensor_parallel_size: TP degree of SP mode, T.
        ulysses_sequence_parallel_size: SP degree of SP mode, S. The engine has S * T ranks.
        enable_shift_parallel: choose the mode step by step; otherwise every step runs in SP mode.
        shift_parallel_threshold: largest number of tokens of a step that runs in TP mode, or ``"auto"``.
        self_check: compare the two modes at start-up. It has no flag.

    Raises:
        ValueError: a value is of the wrong type or outside its range.
    """

    tensor_parallel_size: int = 1
    ulysses_sequence_parallel_size: int = 1
    enable_shift_parallel: bool = False
    shift_parallel_threshold: int | str = DEFAULT_THRESHOLD
    self_check: bool = True

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "ulysses_sequence_parallel_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        threshold = self.shift_parallel_threshold
        if threshold != AUTO and (type(threshold) is not int or threshold < 0):
            raise ValueError(
                f"shift_parallel_threshold must be a whole number of at least 0, or 'auto', got {threshold!r}"
            )
        if type(threshold) is int and threshold > MAX_THRESHOLD:
            raise ValueError(f"shift_parallel_threshold must be at most {MAX_THRESHOLD}, got {threshold}")
        for name in ("enable_shift_parallel", "self_check"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.enable_shift_parallel and self.ulysses_sequence_parallel_size == 1:
            raise ValueError(
                "enable_shift_parallel needs a mode to shift to, but ulysses_sequence_parallel_size is 1; "
                "set --ulysses-sequence-parallel-size to 2 or more (ranks used = tensor x ulysses)"
            )
        if self.shift_parallel_threshold != DEFAULT_THRESHOLD and not self.enable_shift_parallel:
            raise ValueError(
                f"shift_parallel_threshold is {self.shift_parallel_threshold}, but only enable_shift_parallel uses it; "
                "add --enable-shift-parallel, or leave the threshold out"
            )

    @classmethod
    def known(cls, settings: Any) -> dict[str, Any]:
        """``additional_config["shift_parallel"]`` as a dict of known keys, their values unchecked.

        Raises:
            ValueError: not a dict, or a key is unknown.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(settings, Mapping):
            raise ValueError(f"additional_config[{CONFIG_KEY!r}] must be a dict with keys of {names}, got {settings!r}")
        unknown = sorted(set(settings) - set(names), key=repr)
        if unknown:
            raise ValueError(f"additional_config[{CONFIG_KEY!r}] has unknown keys {unknown}; known keys: {names}")
        return dict(settings)

    @classmethod
    def from_dict(cls, settings: Any) -> "ShiftConfig":
        """Read ``additional_config["shift_parallel"]``.

        Raises:
            ValueError: not a dict, a key is unknown, or a value is wrong.
        """
        return cls(**cls.known(settings))

    def to_dict(self) -> dict[str, Any]:
        """The dict that ``from_dict`` reads."""
        return asdict(self)

    @property
    def active(self) -> bool:
        """Whether the engine is ours at all."""
        return self.ulysses_sequence_parallel_size > 1

    @property
    def world_size(self) -> int:
        """Ranks of the engine, P = S * T."""
        return self.dims(0).world

    @property
    def max_tp_tokens(self) -> int:
        """Largest number of tokens of a step that runs in TP mode; 0 without shifting (steps have 1 token or more).

        With ``"auto"``, the default until the engine has measured.
        """
        if not self.enable_shift_parallel:
            return 0
        if isinstance(self.shift_parallel_threshold, str):
            return DEFAULT_THRESHOLD
        return self.shift_parallel_threshold

    @property
    def is_auto(self) -> bool:
        """Whether the engine measures its threshold."""
        return self.shift_parallel_threshold == AUTO

    def dims(self, rank: int) -> ParallelDims:
        """The place of ``rank`` in the engine."""
        return ParallelDims(self.ulysses_sequence_parallel_size, self.tensor_parallel_size, rank)


@cache
def code_hash() -> str:
    """Of this package: vLLM's compile cache hashes traced files only, and would miss a change of how weights lie."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]


def most_step_tokens(scheduler_config: Any) -> int:
    """Tokens of the largest step that is scheduled.

    Fewer than a step may compute where vLLM keeps room for tokens that a draft model adds to each request, or where the
    user says so (``max_num_scheduled_tokens``).
    """
    tokens: int = scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens
    return tokens
