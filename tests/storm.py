"""Shift storm: the mode of every step is drawn at random, and every output must still be that of stock vLLM.

As a command it runs for a long time: ``python tests/storm.py --steps 20000 --sp 2 --tp 2``.
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import tiny
from ports import free_ports

logger = logging.getLogger("storm")

MAX_TOKENS = 24
STEPS_OF_A_SCHEDULE = 1000


class StormError(Exception):
    """An output differs from stock vLLM's, a rank failed, or none answered in time."""


def prompts() -> list[list[int]]:
    """120 prompts of 1 to 200 tokens, half of them with a beginning in common with others."""
    draw = random.Random(0)
    bases = [[draw.randrange(3, 500) for _ in range(160)] for _ in range(4)]
    rows = [[draw.randrange(3, 500) for _ in range(draw.randint(1, 200))] for _ in range(60)]
    for _ in range(60):
        base = draw.choice(bases)
        rows.append([*base[: draw.randint(16, 160)], *(draw.randrange(3, 500) for _ in range(draw.randint(1, 40)))])
    return rows


PROMPTS = prompts()


def random_schedule(seed: int, steps: int) -> dict[str, Any]:
    """More requests than so many steps can take, one in four of them aborted, and a seed for the modes."""
    draw = random.Random(seed)
    requests = []
    at = 0
    while at < steps:
        aborts_after = draw.randint(0, 40) if draw.random() < 0.25 else None
        requests.append(
            {
                "arrives": at,
                "prompt": draw.randrange(len(PROMPTS)),
                "max_tokens": draw.randint(1, MAX_TOKENS),
                "aborts_after": aborts_after,
            }
        )
        # Bursts, with pauses in which the queue runs dry.
        at += draw.choice((0, 0, 0, 1, 2, 3, 5, 25))
    return {"requests": requests, "seed": seed, "steps": steps}


class Storm:
    """A group of rank processes that run schedules; a context manager.

    Args:
        sp: SP degree.
        tp: TP degree of SP mode.
        folder: for the checkpoint and the logs.
    """

    def __init__(self, sp: int, tp: int, folder: Path) -> None:
        self._folder, self._world = folder, sp * tp
        common = {
            "model": str(tiny.make_checkpoint("llama", folder)), "skip_tokenizer_init": True, "dtype": "float32",
            "enforce_eager": True, "max_model_len": 256, "max_num_batched_tokens": 64, "max_num_seqs": 8,
            "kv_cache_memory_bytes": 32 << 20, "block_size": 16, "seed": 0,
            "distributed_executor_backend": "external_launcher",
        }  # fmt: skip
        job = {"common": common, "sp": sp, "tp": tp, "blocks": 22}
        job |= {"prompts": PROMPTS, "max_tokens": MAX_TOKENS}
        (folder / "storm.json").write_text(json.dumps(job))

    def __enter__(self) -> "Storm":
        shared = {"WORLD_SIZE": str(self._world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(2))}
        shared |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_SHIFT_DEBUG": "1"}
        self._processes, self._pipes = [], []
        for rank in range(self._world):
            ours, theirs = Pipe()
            command = [sys.executable, str(Path(__file__).with_name("storm_rank.py"))]
            command += [str(self._folder / "storm.json"), str(theirs.fileno())]
            env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(self._folder / f"log-{rank}", "w") as log:
                self._processes.append(
                    subprocess.Popen(command, env=env, stdout=log, stderr=log, pass_fds=[theirs.fileno()])
                )
            theirs.close()
            self._pipes.append(ours)
        try:
            self._receive(300)
        except BaseException:
            self._kill()
            raise
        return self

    def run(self, schedule: dict[str, Any], seconds: float = 600) -> Counter[str]:
        """Run one schedule on all ranks.

        Raises:
            StormError: see there; names the requests that differ.
        """
        self._send(schedule)
        results = self._receive(seconds)
        wrong = [line for result in results for line in result["wrong"]]
        if wrong:
            raise StormError("\n".join(wrong))
        counts = [Counter(result["counts"]) for result in results]
        assert all(count == counts[0] for count in counts)
        return counts[0]

    def __exit__(self, *_: object) -> None:
        try:
            self._send({})
            for process in self._processes:
                process.wait(30)
        except (OSError, subprocess.TimeoutExpired):
            pass  # after a failure; it has been raised
        finally:
            self._kill()

    def _send(self, message: dict[str, Any]) -> None:
        for pipe in self._pipes:
            pipe.send_bytes(json.dumps(message).encode())

    def _receive(self, seconds: float) -> list[dict[str, Any]]:
        end, results = time.monotonic() + seconds, []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(0.0, end - time.monotonic())):
                    raise StormError(f"rank {rank} has not answered for {seconds} s")
                results.append(json.loads(pipe.recv_bytes()))
            except (EOFError, ConnectionError):
                logs = "\n".join((self._folder / f"log-{r}").read_text()[-3000:] for r in range(self._world))
                raise StormError(f"rank {rank} is gone:\n{logs}") from None
        return results

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def main() -> None:
    """Run so many steps, in schedules of 1,000, and log what happened in them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, Storm(args.sp, args.tp, Path(folder)) as storm:
        begin = time.monotonic()
        seed = args.seed
        while total["steps"] < args.steps:
            total += storm.run(random_schedule(seed, STEPS_OF_A_SCHEDULE))
            seed += 1
            logger.info("%.0f s, all equal: %s", time.monotonic() - begin, dict(total))


if __name__ == "__main__":
    import conftest  # noqa: F401  (the environment of the CPU backend)

    main()
