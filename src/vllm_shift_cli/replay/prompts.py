"""Prompts of an exact number of tokens, as token ids."""

import numpy as np

from vllm_shift_cli.replay.trace import TraceRequest

# Block size of the hash ids in Mooncake traces.
BLOCK = 512

# Ids that every vocabulary has, past the special tokens that many begin with.
_LOWEST, _HIGHEST = 10, 250

# Parts of a seed: block 3 and request 3 must not have the same tokens.
_UNIQUE, _SHARED = 0, 1


def prompt_ids(request: TraceRequest, index: int, seed: int) -> list[int]:
    """Random token ids for one request.

    Args:
        request: its blocks say which parts it shares with other requests; what has no block is its own.
        index: number of the request in the trace.
        seed: the same seed gives the same prompts. Another one finds nothing in a server's prefix cache.

    Returns:
        ``request.prompt_tokens`` ids.
    """
    parts = [_draw(BLOCK, seed, _SHARED, block) for block in request.blocks[: -(-request.prompt_tokens // BLOCK)]]
    missing = request.prompt_tokens - BLOCK * len(parts)
    if missing > 0:
        parts.append(_draw(missing, seed, _UNIQUE, index))
    ids: list[int] = np.concatenate(parts)[: request.prompt_tokens].tolist()
    return ids


def _draw(count: int, *seed: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.random.default_rng(seed).integers(_LOWEST, _HIGHEST, count)
