"""The one exchange of Ulysses attention: tokens of all heads <-> all tokens of this rank's heads.

Both directions keep the number of rows. With S ranks in the SP group and n rows of hidden states a rank:

- the *folded* view [n*S, w] is what the layers around attention see: row i*S + j is this rank's token i, head
  block j (the heads that SP rank j attends with);
- the *head* view [n*S, w] is what attention sees: row r*n + i is token i of SP rank r, this rank's head block.
  Its first N rows are the N tokens of the step, in order.

They are PyTorch custom ops, so that a compiler sees one opaque call of unchanged shape and CUDA graphs record it.
Method: DeepSpeed-Ulysses (arXiv 2309.14509), section 3.1.
"""

from weakref import WeakValueDictionary

import torch
from torch.distributed import all_to_all_single
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.utils.torch_utils import direct_register_custom_op

# Custom ops take no objects, so a group travels by its name, as in vllm/distributed/parallel_state.py.
_groups: WeakValueDictionary[str, GroupCoordinator] = WeakValueDictionary()


def register_group(group: GroupCoordinator) -> str:
    """Make a group known to the ops of this module; returns the name to pass them."""
    _groups[group.unique_name] = group
    return str(group.unique_name)


def _all_to_all(send: torch.Tensor, group: GroupCoordinator) -> torch.Tensor:
    """Send block j of [S, ...] to SP rank j; block j of the result came from it."""
    recv = torch.empty_like(send)
    all_to_all_single(recv, send, group=group.device_group)
    return recv


def _tokens_to_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_name: str) -> torch.Tensor:
    group = _groups[group_name]
    sp = group.world_size
    parts = [x.view(-1, sp, x.shape[-1]).transpose(0, 1) for x in (q, k, v)]
    send = torch.cat(parts, dim=-1)
    return _all_to_all(send, group).view(-1, send.shape[-1])


def _tokens_to_heads_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_name: str) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[-1] + k.shape[-1] + v.shape[-1])


def _heads_to_tokens(x: torch.Tensor, group_name: str) -> torch.Tensor:
    group = _groups[group_name]
    recv = _all_to_all(x.view(group.world_size, -1, x.shape[-1]), group)
    return recv.transpose(0, 1).reshape(x.shape)


def _heads_to_tokens_fake(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("vllm_shift", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op("tokens_to_heads", _tokens_to_heads, fake_impl=_tokens_to_heads_fake, target_lib=_library)
direct_register_custom_op("heads_to_tokens", _heads_to_tokens, fake_impl=_heads_to_tokens_fake, target_lib=_library)


def tokens_to_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Before attention: q, k, v from the folded view to the head view, in one all-to-all.

    Args:
        q: [n*S, heads * head size] in the folded view; k and v: [n*S, KV heads * head size].
        k: see q.
        v: see q.
        group_name: the SP group, from ``register_group``.

    Returns:
        q, k, v in the head view, each of its input's shape and dtype; views of one buffer, rows not contiguous.
    """
    packed = torch.ops.vllm_shift.tokens_to_heads(q, k, v, group_name)
    q, k, v = packed.split([q.shape[-1], k.shape[-1], v.shape[-1]], dim=-1)
    return q, k, v


def heads_to_tokens(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """After attention: [n*S, heads * head size] from the head view back to the folded view, same shape and dtype."""
    folded: torch.Tensor = torch.ops.vllm_shift.heads_to_tokens(x, group_name)
    return folded
