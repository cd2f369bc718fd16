"""The entry point that vLLM calls in each of its processes, and the one change to vLLM's own classes.

``EngineArgs`` has no extension point for new fields, so three are added to it here, with their command-line flags.
With the flags at their defaults it behaves as before, and nothing else of vLLM is touched.
"""

import argparse
import copyreg
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import vllm
from vllm.logger import init_logger

from vllm_shift.config import AUTO, CONFIG_KEY, ShiftConfig

logger = init_logger(f"vllm.{__name__}")

SUPPORTED_VLLM = "0.26.0"


# The fields that EngineArgs gains; it has the first one already, and the last one has no flag.
_FIELDS = [
    field for field in dataclasses.fields(ShiftConfig) if field.name not in ("tensor_parallel_size", "self_check")
]


def register() -> None:
    """Entry point ``vllm.general_plugins``: add the three flags to vLLM's ``EngineArgs``; a second call does nothing.

    With a vLLM version other than the supported one it logs an error and leaves vLLM as it is.
    """
    found = vllm.__version__.split("+")[0]
    if found != SUPPORTED_VLLM:
        logger.error(
            "vllm-shift works with vLLM %s, found %s: Shift Parallelism is not available.",
            SUPPORTED_VLLM,
            found,
        )
        return
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    if getattr(EngineArgs, "_vllm_shift", False):
        return
    if taken := [field.name for field in _FIELDS if hasattr(EngineArgs, field.name)]:
        logger.error("Another vLLM plugin has added %s: vllm-shift leaves vLLM as it is.", taken)
        return
    EngineArgs._vllm_shift = True
    for cls in (EngineArgs, AsyncEngineArgs):
        _add_fields(cls)
    _add_pickling(EngineArgs)
    _add_flags(EngineArgs)
    _add_handover(EngineArgs)
    _add_translation(EngineArgs)


def _add_fields(cls: type) -> None:
    """Let a dataclass take the fields in ``_FIELDS`` as keyword arguments, too."""
    stock_init = cls.__init__  # type: ignore[misc]

    @functools.wraps(stock_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # Defaults stay with the class: of an instance without our settings, vars() is what vLLM expects.
        for field in _FIELDS:
            if (value := kwargs.pop(field.name, field.default)) != field.default:
                setattr(self, field.name, value)
        stock_init(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[misc]
    for field in _FIELDS:
        setattr(cls, field.name, field.default)
        cls.__dataclass_fields__[field.name] = field  # type: ignore[attr-defined]


def _has_our_settings(engine_args: Any) -> bool:
    additional = engine_args.additional_config
    in_config = isinstance(additional, Mapping) and CONFIG_KEY in additional
    return in_config or any(getattr(engine_args, field.name) != field.default for field in _FIELDS)


def _add_pickling(engine_args: Any) -> None:
    """Let a process that unpickles our settings import this module: it may load plugins later, or never."""

    def reduce(self: Any) -> tuple[Any, ...]:
        return (_new if _has_our_settings(self) else copyreg.__newobj__), (type(self),), self.__getstate__()  # type: ignore[attr-defined]

    engine_args.__reduce__ = reduce


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _threshold(text: str) -> int | str:
    """The value of ``--shift-parallel-threshold``: a number or ``auto``."""
    return text if text == AUTO else int(text)


_threshold.__name__ = "number of tokens, or 'auto'"  # as argparse's message names it


def _add_flags(engine_args: Any) -> None:
    stock_add_cli_args = engine_args.add_cli_args

    @functools.wraps(stock_add_cli_args)
    def add_cli_args(parser: Any) -> Any:
        parser = stock_add_cli_args(parser)
        group = parser.add_argument_group(
            title="ShiftParallelConfig",
            description="Shift Parallelism (vllm-shift): tensor parallelism for small batches, "
            "Ulysses sequence parallelism for large ones.",
        )
        exclusive = group.add_mutually_exclusive_group()
        if ports := parser._option_string_actions.get("--data-parallel-multi-port-external-lb"):
            # The servers that it starts read the parsed arguments before they load plugins, and would lose the flags.
            exclusive._group_actions.append(ports)
        exclusive.add_argument(
            "--ulysses-sequence-parallel-size",
            type=int,
            default=ShiftConfig.ulysses_sequence_parallel_size,
            help="Ulysses sequence parallel degree. The engine uses tensor x ulysses GPUs.",
        )
        group.add_argument(
            "--enable-shift-parallel",
            action=argparse.BooleanOptionalAction,
            default=ShiftConfig.enable_shift_parallel,
            help="Run small batches with tensor parallelism over all tensor x ulysses GPUs. "
            "Without it every step runs with sequence parallelism.",
        )
        group.add_argument(
            "--shift-parallel-threshold",
            type=_threshold,
            default=ShiftConfig.shift_parallel_threshold,
            help="Largest number of tokens in a step that still runs with tensor parallelism over all GPUs, "
            "or 'auto' to measure it at start-up.",
        )
        return parser

    engine_args.add_cli_args = staticmethod(add_cli_args)


def _add_handover(engine_args: Any) -> None:
    """Let ``from_cli_args`` copy the flags to ``additional_config``, which no process loses, and add ``ExitCode``.

    API server processes of their own are given the parsed arguments, and read them before they load plugins.
    """
    stock_from_cli_args = engine_args.from_cli_args.__func__

    @functools.wraps(stock_from_cli_args)
    def from_cli_args(cls: Any, args: Any) -> Any:
        flags = {field.name: getattr(args, field.name, field.default) for field in _FIELDS}
        given = {field.name: flags[field.name] for field in _FIELDS if flags[field.name] != field.default}
        others = getattr(args, "additional_config", None) or {}
        settings = others.get(CONFIG_KEY, {}) if isinstance(others, dict) else None
        if isinstance(settings, dict):
            settings = given | settings
            if given:
                args.additional_config = others | {CONFIG_KEY: settings}
            if settings.get("ulysses_sequence_parallel_size", 1) != 1:
                from vllm_shift.exit_code import add_exit_code

                add_exit_code(args)
        return stock_from_cli_args(cls, args)

    engine_args.from_cli_args = classmethod(from_cli_args)


def _add_translation(engine_args: Any) -> None:
    stock_create = engine_args.create_engine_config

    @functools.wraps(stock_create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_no_setting_is_misplaced(self.additional_config)
        if not _has_our_settings(self):
            return stock_create(self, *args, **kwargs)
        from vllm_shift.translate import create_shift_engine_config

        return create_shift_engine_config(stock_create, self, *args, **kwargs)

    engine_args.create_engine_config = create_engine_config


def _check_no_setting_is_misplaced(additional: Any) -> None:
    """Refuse settings of ours that would have no effect where they are.

    Raises:
        ValueError: names the key, and what it should be.
    """
    names = [field.name for field in _FIELDS]
    for key in additional if isinstance(additional, Mapping) else ():
        spelt = str(key).replace("-", "_")
        if spelt in names:
            raise ValueError(f"additional_config has {key!r}, which belongs in additional_config[{CONFIG_KEY!r}]")
        if spelt == CONFIG_KEY != key:
            raise ValueError(f"additional_config has {key!r}, which is spelt {CONFIG_KEY!r}")
