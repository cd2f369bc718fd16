"""One rank that compares settings and steps with the others; its last line is what that raises, as JSON.

Usage: agreement_rank.py RANK WORLD PORT. The last rank has other settings, and diverges in each third step.
"""

import json
import sys

from torch import distributed

from vllm_shift.agreement import StepCheck, check_settings

DIVERGENCES = {
    "nothing": (256, [1, 90, 7]),
    "mode": (64, [1, 90, 7]),
    "tokens": (256, [1, 90]),
    "order": (256, [90, 1, 7]),
    "no step": (256, []),
}

SETTINGS = {"the same settings": 256, "other settings": "auto", "another version": None}


def main() -> None:
    rank, world, port = (int(argument) for argument in sys.argv[1:4])
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    raised = {}
    for what in DIVERGENCES:
        check = StepCheck(distributed.group.WORLD)
        check(256, [1])
        check(256, [])
        try:
            check(*DIVERGENCES[what if rank == world - 1 else "nothing"])
        except RuntimeError as error:
            raised[what] = str(error)
    for what, threshold in SETTINGS.items():
        settings = {"shift_parallel_threshold": threshold if rank == world - 1 else 256, "enforce_eager": False}
        if threshold is None:
            settings = {"enforce_eager": False} | ({"of a newer version": 1} if rank == world - 1 else {})
        try:
            check_settings(distributed.group.WORLD, settings)
        except ValueError as error:
            raised[what] = str(error)
    distributed.destroy_process_group()
    sys.stdout.write("\n" + json.dumps(raised))


if __name__ == "__main__":
    main()
