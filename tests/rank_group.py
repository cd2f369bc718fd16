"""Groups of rank processes that run many engines, shared by the tests of tokens, KV caches and the self-check."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from mutations import MUTATIONS, MUTATIONS_OF_QUANTIZED
from ports import free_ports
from quantize import quantize_checkpoint

# Of log-probabilities and of the KV cache, in fp32.
TOLERANCE = 1e-3

LAYOUTS = {2: [(2, 1)], 4: [(4, 1), (2, 2)], 8: [(8, 1), (4, 2), (2, 4)]}
NEVER = 10**9
THRESHOLDS = [0, 64, NEVER]
# Whose four ranks are in `make test`, too: without biases, and with.
ON_FOUR_RANKS = ("llama", "qwen2")


@dataclass(frozen=True)
class Case:
    """A tiny model in a layout."""

    name: str
    sp: int
    tp: int

    @property
    def world(self) -> int:
        return self.sp * self.tp

    @property
    def nightly(self) -> bool:
        return self.world > (4 if self.name in ON_FOUR_RANKS else 2)


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The outputs of two runs: the same tokens, with log-probabilities as near as in fp32."""
    assert len(found["outputs"]) == len(expected["outputs"]) > 0
    for ours, theirs in zip(found["outputs"], expected["outputs"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=TOLERANCE)


def thresholds_of(name: str, nightly: bool) -> list[int]:
    """Of a tiny model; of the long tail `make test` has the one with which both modes run."""
    if name in tiny.CONFIGS:
        return THRESHOLDS
    return THRESHOLDS[:2] if nightly else THRESHOLDS[1:2]


CASES = [
    Case(name, sp, tp)
    for layouts in LAYOUTS.values()
    for sp, tp in layouts
    for name in (*tiny.CONFIGS, *tiny.MORE_CONFIGS)
    if (name != "olmo2" or tp == 1)  # otherwise refused (limits.py)
    and (name in tiny.CONFIGS or sp * tp <= 4)
]


# Of those that engines with sharpened attention have, too: in the first layer, and in the last.
SHARP_MUTATIONS = ("wrong positions", "one stale slot")


def self_checks(model: str) -> list[dict]:
    """Engines that only start: sound ones in every dtype and form, and ones with a bug."""
    args = {"model": model, "ulysses_sequence_parallel_size": 2}
    shift = {"enable_shift_parallel": True, "shift_parallel_threshold": 20}
    sound = {
        "float16": shift | {"dtype": "float16"},
        "bfloat16": shift | {"dtype": "bfloat16"},
        "plain": {"dtype": "bfloat16"},
        "dummy": shift | {"dtype": "bfloat16", "load_format": "dummy"},
        "never": shift | {"shift_parallel_threshold": 128},
        "off": shift | {"additional_config": {"shift_parallel": {"self_check": False}}},
        "auto": shift | {"shift_parallel_threshold": "auto"},
        "one-token": shift | {"shift_parallel_threshold": 0, "max_num_batched_tokens": 1, "max_num_seqs": 1},
        "auto-again": shift | {"shift_parallel_threshold": "auto"},
    }
    engines = [{"name": f"check-{name}", "args": args | extra} for name, extra in sound.items()]
    for name in MUTATIONS:
        for dtype in ("float32", "bfloat16"):
            engines.append({"name": f"{name}-{dtype}", "args": args | shift | {"dtype": dtype}, "mutation": name})
    sharp = args | shift | {"dtype": "float16", "model": f"{model}-sharp"}
    engines.append({"name": "check-sharp", "args": sharp})
    return engines + [{"name": f"{name}-sharp", "args": sharp, "mutation": name} for name in SHARP_MUTATIONS]


# Forms of tests/quantize.py that vLLM's CPU build has kernels for.
QUANTIZED = ("int8", "fp8-channel")
# Forms and dtypes of engines that only start; ModelOpt's have no float32.
QUANTIZED_CHECKS = [(form, dtype) for form in QUANTIZED for dtype in ("float32", "bfloat16")]
QUANTIZED_CHECKS += [("modelopt-cache", "bfloat16")]


def quantized(folder: Path) -> list[dict]:
    """Engines of a quantized Llama on two ranks: stock vLLM with TP=2 and in two stages of TP=1; ours; with bugs."""
    engines = []
    shift = {"ulysses_sequence_parallel_size": 2, "enable_shift_parallel": True}
    paths = {form: str(folder / f"llama-{form}") for form, _ in QUANTIZED_CHECKS}
    for form, path in paths.items():
        quantize_checkpoint(folder / "llama", form, Path(path))
    for form in QUANTIZED:
        model = {"model": paths[form]}
        engines += [
            {"name": f"{form}-stages", "args": model | {"pipeline_parallel_size": 2}, "thresholds": [None]},
            {"name": f"{form}-stock", "args": model | {"tensor_parallel_size": 2}, "thresholds": [None, None]},
            {"name": f"{form}-2x1", "args": model | shift, "thresholds": [0, NEVER]},
        ]
    check = shift | {"shift_parallel_threshold": 20}
    for form, dtype in QUANTIZED_CHECKS:
        engines.append({"name": f"check-{form}-{dtype}", "args": check | {"model": paths[form], "dtype": dtype}})
    check |= {"model": paths["int8"], "dtype": "bfloat16"}
    return engines + [{"name": name, "args": check, "mutation": name} for name in MUTATIONS_OF_QUANTIZED]


# That a group of ranks may take: less than a test may, see pyproject.toml and the Makefile.
SECONDS, NIGHTLY_SECONDS = 840, 1740


def wait_for_all(processes: list[subprocess.Popen], seconds: float) -> list[int | None]:
    """Exit codes of all processes, or of those that ended when the first failed or the time was up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.5)
    return codes


def run_ranks(
    script: str,
    world: int,
    folder: Path,
    job: Mapping[str, Any],
    ports: int,
    seconds: float = SECONDS,
    variables: Mapping[str, str] | None = None,
) -> list[dict]:
    """Run a script of this folder on every rank of a group; what each rank writes to ``results-RANK.json``.

    Args:
        script: called with the path of the job's file, and RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
        world: number of ranks.
        folder: for the job's file, logs and results.
        job: what the script reads.
        ports: how many ports in a row it uses, from MASTER_PORT on.
        seconds: that it may take, less than the time limit of a test.
        variables: of the environment, in the place of those of this process.
    """
    (folder / "job.json").write_text(json.dumps(job))
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(ports))}
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder / "job.json")]
    ranks = []
    for rank in range(world):
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CACHE_ROOT": str(folder / "cache")} | (variables or {})
        with open(folder / f"log-{rank}", "w") as log:
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = wait_for_all(ranks, seconds)
    finally:
        for process in ranks:
            process.kill()
    if any(code != 0 for code in codes):
        pytest.fail(f"ranks exited with {codes}:\n" + (folder / "log-0").read_text()[-5000:])
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(world)]


class Group:
    """Results of all engines of P ranks: by engine name, for every rank.

    Args:
        world: P.
        nightly: run the engines of the long tail instead of those of `make test`.
        folder: for checkpoints, logs and results.
    """

    def __init__(self, world: int, nightly: bool, folder: Path) -> None:
        engines = []
        cases = [case for case in CASES if (case.world, case.nightly) == (world, nightly)]
        for name in dict.fromkeys(case.name for case in cases):
            model = {"model": str(tiny.make_checkpoint(name, folder))}
            thresholds = thresholds_of(name, nightly)
            stock = model | {"tensor_parallel_size": world}
            engines.append({"name": f"{name}-stock", "args": stock, "thresholds": [None] * len(thresholds)})
            for case in (case for case in cases if case.name == name):
                shift = model | {"tensor_parallel_size": case.tp, "ulysses_sequence_parallel_size": case.sp}
                shift |= {"enable_shift_parallel": True}
                engines.append({"name": f"{name}-{case.sp}x{case.tp}", "args": shift, "thresholds": thresholds})
        if world == 2 and not nightly:
            tiny.sharpen(folder / "qwen3", folder / "qwen3-sharp")
            engines += self_checks(str(folder / "qwen3")) + quantized(folder)
        common = {
            "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 512,
            "max_num_batched_tokens": 128, "max_num_seqs": 8, "kv_cache_memory_bytes": 8 << 20, "block_size": 32,
            "distributed_executor_backend": "external_launcher", "seed": 0,
        }  # fmt: skip
        job = {"folder": str(folder), "prompts": tiny.prompts(), "max_tokens": 8, "engines": engines, "common": common}
        self.folder, self.engines = folder, engines
        seconds = NIGHTLY_SECONDS if nightly else SECONDS
        self.results = run_ranks("rank_main.py", world, folder, job, ports=len(engines), seconds=seconds)
