"""The settings: what is accepted, what is refused, and how they read."""

import pytest

from vllm_shift.config import ShiftConfig


def test_defaults_are_inactive():
    assert not ShiftConfig().active
    assert ShiftConfig().world_size == 1


def test_round_trip():
    config = ShiftConfig(4, 2, True, 100)
    assert ShiftConfig.from_dict(config.to_dict()) == config
    assert config.world_size == 8
    assert config.dims(5).sp_rank == 1


@pytest.mark.parametrize(
    ("enabled", "threshold", "most"),
    [(True, 100, 100), (True, 0, 0), (False, 256, 0), (True, "auto", 256), (True, 2**31 - 1, 2**31 - 1)],
)
def test_largest_tp_step(enabled, threshold, most):
    config = ShiftConfig(1, 2, enabled, threshold)
    assert config.max_tp_tokens == most
    assert config.is_auto == (threshold == "auto")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_shift_parallel": True}, "ulysses_sequence_parallel_size is 1"),
        ({"ulysses_sequence_parallel_size": 0}, "at least 1, got 0"),
        ({"ulysses_sequence_parallel_size": "2"}, "got '2'"),
        ({"tensor_parallel_size": -1}, "at least 1, got -1"),
        ({"enable_shift_parallel": 1}, "true or false, got 1"),
        (
            {"ulysses_sequence_parallel_size": 2, "enable_shift_parallel": True, "shift_parallel_threshold": -1},
            "shift_parallel_threshold must be a whole number of at least 0, or 'auto', got -1",
        ),
        (
            {"ulysses_sequence_parallel_size": 2, "enable_shift_parallel": True, "shift_parallel_threshold": 1.5},
            "got 1.5",
        ),
        ({"ulysses_sequence_parallel_size": 2, "shift_parallel_threshold": 9}, "add --enable-shift-parallel"),
        (
            {"ulysses_sequence_parallel_size": 2, "enable_shift_parallel": True, "shift_parallel_threshold": 2**31},
            "at most 2147483647, got 2147483648",
        ),
        ({"threshold": 9, 3: 4}, r"unknown keys \['threshold', 3\]"),
        ({"threshold": 9}, r"unknown keys \['threshold'\]"),
        ([], "must be a dict"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        ShiftConfig.from_dict(settings)
