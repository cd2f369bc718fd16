"""What nvidia-smi says of memory; nothing where there is none."""

import subprocess


def _ask(query: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split(", ") for line in text.splitlines()]


def used() -> list[int]:
    """MiB in use on each GPU."""
    return [int(memory) for (memory,) in _ask("gpu=memory.used") if memory.isdigit()]


def used_by_process() -> dict[int, int]:
    """MiB of each process, by its pid; in a virtual machine or container it may list none, or pids of the host."""
    found: dict[int, int] = {}
    for row in _ask("compute-apps=pid,used_memory"):
        if len(row) == 2 and row[0].isdigit():
            found[int(row[0])] = found.get(int(row[0]), 0) + (int(row[1]) if row[1].isdigit() else 0)
    return found
