"""One rank that compares three steps with the others by ``StepCheck``; prints what it raises.

Usage: agreement_rank.py RANK WORLD PORT WHAT, WHAT being how the last rank diverges in its third step.
"""

import sys

from torch import distributed

from vllm_shift.agreement import StepCheck

DIVERGENCES = {
    "nothing": (256, [1, 90, 7]),
    "mode": (64, [1, 90, 7]),
    "tokens": (256, [1, 90]),
    "order": (256, [90, 1, 7]),
    "no step": (256, []),
}


def main() -> None:
    rank, world, port, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    check = StepCheck(distributed.group.WORLD)
    check(256, [1])
    check(256, [])
    try:
        check(*DIVERGENCES[what if rank == world - 1 else "nothing"])
    except RuntimeError as error:
        sys.stdout.write(str(error))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
