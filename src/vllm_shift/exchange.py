"""The one exchange of Ulysses attention: tokens of all heads <-> all tokens of this rank's heads.

Both directions keep the number of rows. With S ranks in the SP group and n rows of hidden states a rank:

- the *folded* view [n*S, w] is what the layers around attention see: row i*S + j is this rank's token i, head
  block j (the heads that SP rank j attends with);
- the *head* view [n*S, w] is what attention sees: row r*n + i is token i of SP rank r, this rank's head block.
  Its first N rows are the N tokens of the step, in order.

Each direction is a PyTorch custom op: opaque to a compiler, recorded by CUDA graphs. It packs, calls the all-to-all of
the process group and unpacks, or has ``peers.py`` do it all at once.
Method: DeepSpeed-Ulysses (arXiv 2309.14509), section 3.1.
"""

from typing import Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch.distributed import all_to_all_single
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.utils.torch_utils import direct_register_custom_op


class PeerExchange(Protocol):
    """A way to exchange of its own; shapes are those of the ops."""

    def tokens_to_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See ``_tokens_to_heads``."""

    def heads_to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """See ``_heads_to_tokens``."""


# Custom ops take no objects, so a group travels by its name, as in vllm/distributed/parallel_state.py.
_groups: WeakValueDictionary[str, GroupCoordinator] = WeakValueDictionary()
_peers: WeakKeyDictionary[GroupCoordinator, PeerExchange] = WeakKeyDictionary()


def register_group(group: GroupCoordinator) -> str:
    """Make a group known to the ops of this module; returns the name to pass."""
    _groups[group.unique_name] = group
    return str(group.unique_name)


def use_peers(group: GroupCoordinator, peers: PeerExchange) -> None:
    """From now on the group exchanges through ``peers``; all its ranks have to call this."""
    _peers[group] = peers


def _all_to_all(x: torch.Tensor, group: GroupCoordinator) -> torch.Tensor:
    """Send block j of ``x`` [S, ...] to SP rank j; block j of the result came from it."""
    received = torch.empty_like(x)
    all_to_all_single(received, x, group=group.device_group)
    return received


def _tokens_to_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sp: int, group_name: str) -> torch.Tensor:
    """[n*S, ...] each, in the folded view, to [n*S, all columns] in the head view."""
    group = _groups[group_name]
    if peers := _peers.get(group):
        return peers.tokens_to_heads(q, k, v)
    send = torch.cat([x.view(-1, sp, x.shape[-1]).transpose(0, 1) for x in (q, k, v)], dim=-1).contiguous()
    return _all_to_all(send, group).view(-1, send.shape[-1])


def _tokens_to_heads_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sp: int, group_name: str) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[-1] + k.shape[-1] + v.shape[-1])


def _heads_to_tokens(x: torch.Tensor, sp: int, group_name: str) -> torch.Tensor:
    """[n*S, ...] in the head view to the folded view."""
    group = _groups[group_name]
    if peers := _peers.get(group):
        return peers.heads_to_tokens(x)
    return _all_to_all(x.view(sp, -1, x.shape[-1]), group).transpose(0, 1).reshape(x.shape)


def _heads_to_tokens_fake(x: torch.Tensor, sp: int, group_name: str) -> torch.Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("vllm_shift", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op("tokens_to_heads", _tokens_to_heads, fake_impl=_tokens_to_heads_fake, target_lib=_library)
direct_register_custom_op("heads_to_tokens", _heads_to_tokens, fake_impl=_heads_to_tokens_fake, target_lib=_library)


def tokens_to_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sp: int, group_name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Before attention: q, k, v from the folded view to the head view, in one all-to-all.

    Args:
        q: [n*S, heads * head size] in the folded view; k and v: [n*S, KV heads * head size].
        k: see q.
        v: see q.
        sp: the SP degree, S.
        group_name: the SP group, from ``register_group``.

    Returns:
        q, k, v in the head view, each of its input's shape and dtype; views of one buffer, rows not contiguous.
    """
    received = torch.ops.vllm_shift.tokens_to_heads(q, k, v, sp, group_name)
    q, k, v = received.split([x.shape[-1] for x in (q, k, v)], dim=-1)
    return q, k, v


def heads_to_tokens(x: torch.Tensor, sp: int, group_name: str) -> torch.Tensor:
    """After attention: [n*S, heads * head size] from the head view back to the folded view, same shape and dtype."""
    folded: torch.Tensor = torch.ops.vllm_shift.heads_to_tokens(x, sp, group_name)
    return folded
