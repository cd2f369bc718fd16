"""Settings, flags and traces of any kind: a valid result or our own error, never anything else. No engine starts."""

import contextlib
import io
import json
from types import SimpleNamespace

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_shift import translate
from vllm_shift.config import AUTO, CONFIG_KEY, MAX_THRESHOLD, ShiftConfig
from vllm_shift_cli.errors import CommandError
from vllm_shift_cli.replay.trace import read_trace

NAMES = list(ShiftConfig().to_dict())
SCALARS = st.none() | st.booleans() | st.integers() | st.integers(-1, 9) | st.floats() | st.text(max_size=9)
VALUES = st.recursive(SCALARS | st.just(AUTO), lambda inner: st.lists(inner, max_size=3))
KEYS = st.sampled_from(NAMES) | st.sampled_from(NAMES) | st.text(max_size=9) | st.integers() | st.none()
SETTINGS = st.dictionaries(KEYS, VALUES, max_size=6)
SENSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "tensor_parallel_size": st.integers(0, 9),
        "ulysses_sequence_parallel_size": st.integers(0, 9),
        "enable_shift_parallel": st.booleans(),
        "shift_parallel_threshold": st.integers(-1, 600) | st.integers() | st.just(AUTO),
        "self_check": st.booleans(),
    },
)
# The same examples every time, in CI as well.
repeatable = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def check_valid(config: ShiftConfig) -> None:
    assert ShiftConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.world_size == config.ulysses_sequence_parallel_size * config.tensor_parallel_size >= 1
    assert 0 <= config.max_tp_tokens <= MAX_THRESHOLD


def test_settings():
    accepted = []

    @repeatable
    @given(VALUES | SETTINGS | SENSIBLE)
    def check(found):
        with contextlib.suppress(ValueError):
            check_valid(config := ShiftConfig.from_dict(found))
            accepted.append(config)

    check()
    assert len(accepted) > 10


def test_flags_together_with_additional_config():
    accepted = []

    @repeatable
    @given(
        flags=SENSIBLE,
        additional=st.none() | VALUES | st.dictionaries(st.just(CONFIG_KEY), SENSIBLE | SETTINGS | VALUES),
    )
    def check(flags, additional):
        engine_args = SimpleNamespace(**(ShiftConfig().to_dict() | flags), additional_config=additional)
        with contextlib.suppress(ValueError):
            config = translate.read_settings(engine_args)
            check_valid(config)
            accepted.append(config)
            given_there = additional.get(CONFIG_KEY, {}) if additional else {}
            for name, value in config.to_dict().items():
                assert value in (flags.get(name), given_there.get(name), ShiftConfig().to_dict()[name])

    check()
    assert len(accepted) > 10


PARSER = EngineArgs.add_cli_args(FlexibleArgumentParser())
WORDS = st.text(st.characters(codec="utf-8"), max_size=12) | st.integers().map(str) | st.just(AUTO)


def test_command_lines():
    accepted = []

    @repeatable
    @given(st.dictionaries(st.sampled_from(["--ulysses-sequence-parallel-size", "--shift-parallel-threshold"]), WORDS),
           st.booleans())  # fmt: skip
    def check(words, enabled):
        line = [f"{flag}={word}" for flag, word in words.items()] + ["--enable-shift-parallel"] * enabled
        # argparse ends the process, with a message.
        with contextlib.suppress(SystemExit, ValueError), contextlib.redirect_stderr(io.StringIO()):
            check_valid(config := translate.read_settings(PARSER.parse_args(line)))
            accepted.append(config)

    check()
    assert any(config.active for config in accepted)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny.make_checkpoint("llama", tmp_path_factory.mktemp("fuzz")))


def test_whole_engine_configs(llama):
    """Of those that pass, the engine is stock vLLM with TP = P, and P divides the model."""
    passed = []
    likely = st.fixed_dictionaries(
        {"ulysses_sequence_parallel_size": st.sampled_from([2, 4, 1, 3]), "enable_shift_parallel": st.booleans()},
        optional={
            "tensor_parallel_size": st.sampled_from([1, 2, 4, 0]),
            "shift_parallel_threshold": st.just(AUTO) | st.integers(0, 600) | st.integers(),
        },
    )

    @settings(repeatable, max_examples=40)
    @given(
        likely,
        st.fixed_dictionaries(
            {},
            optional={
                "max_num_batched_tokens": st.integers(0, 3000),
                "max_num_seqs": st.integers(0, 9),
                "max_model_len": st.integers(-1, 2000),
                "additional_config": st.dictionaries(st.just(CONFIG_KEY), SENSIBLE) | st.just({"other plugin": 1}),
                "pipeline_parallel_size": st.sampled_from([1, 1, 2, 0]),
                "data_parallel_size": st.sampled_from([1, 1, 2, 0]),
                "enforce_eager": st.booleans(),
            },
        ),
    )
    def check(flags, others):
        try:
            args = EngineArgs(model=llama, dtype="float32", **flags, **others)
            config = args.create_engine_config()
        except ValueError:
            return
        shift = ShiftConfig.from_dict((config.additional_config or {}).get(CONFIG_KEY, {}))
        ours = config.parallel_config.worker_cls == "vllm_shift.worker_cpu.ShiftCPUWorker"
        assert ours == shift.active
        if ours:
            ranks = config.parallel_config.tensor_parallel_size
            assert ranks == config.parallel_config.world_size == shift.world_size
            assert tiny.SHAPE["num_attention_heads"] % ranks == 0
        passed.append(ours)

    check()
    assert any(passed)
    assert not all(passed)


LINES = [
    '{"arrival_s": 0.5, "prompt_tokens": 200, "output_tokens": 50}',
    '{"arrival_s": 1e999, "prompt_tokens": 1, "output_tokens": 1}',
    '{"timestamp": 3, "input_length": 7, "output_length": 1, "hash_ids": [1]}',
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:15:46.68,374,44",
    "2023-11-16,1,0",
    *("{", "[1]", "null", '"', ""),
]


def test_traces(tmp_path):
    path, accepted = tmp_path / "trace", set()

    @repeatable
    @given(st.binary(max_size=200) | st.lists(st.sampled_from(LINES)).map(lambda rows: "\n".join(rows).encode()))
    def check(content):
        path.write_bytes(content)
        with contextlib.suppress(CommandError):
            name, requests = read_trace(path)
            accepted.add(name)
            assert requests
            assert all(r.arrival >= 0 and r.prompt_tokens > 0 and r.output_tokens > 0 for r in requests)

    check()
    assert len(accepted) > 1
