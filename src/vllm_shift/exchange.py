"""The one exchange of Ulysses attention: tokens of all heads <-> all tokens of this rank's heads.

Both directions keep the number of rows. With S ranks in the SP group and n rows of hidden states a rank:

- the *folded* view [n*S, w] is what the layers around attention see: row i*S + j is this rank's token i, head
  block j (the heads that SP rank j attends with);
- the *head* view [n*S, w] is what attention sees: row r*n + i is token i of SP rank r, this rank's head block.
  Its first N rows are the N tokens of the step, in order.

The all-to-all alone is a PyTorch custom op: opaque to a compiler, of unchanged shape, recorded by CUDA graphs. What
goes before and after it is plain PyTorch, so that Inductor writes rotary embedding's results straight into the send
buffer.
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
    """Make a group known to the op of this module; returns the name to pass."""
    _groups[group.unique_name] = group
    return str(group.unique_name)


def _all_to_all(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """Send block j of ``x`` [S, ...] to SP rank j; block j of the result came from it."""
    received = torch.empty_like(x)
    all_to_all_single(received, x, group=_groups[group_name].device_group)
    return received


def _all_to_all_fake(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("vllm_shift", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op("all_to_all", _all_to_all, fake_impl=_all_to_all_fake, target_lib=_library)


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
    blocks = [x.view(-1, sp, x.shape[-1]).transpose(0, 1) for x in (q, k, v)]
    send = torch.cat(blocks, dim=-1).contiguous()
    received = torch.ops.vllm_shift.all_to_all(send, group_name)
    q, k, v = received.view(-1, send.shape[-1]).split([x.shape[-1] for x in (q, k, v)], dim=-1)
    return q, k, v


def heads_to_tokens(x: torch.Tensor, sp: int, group_name: str) -> torch.Tensor:
    """After attention: [n*S, heads * head size] from the head view back to the folded view, same shape and dtype."""
    received = torch.ops.vllm_shift.all_to_all(x.view(sp, -1, x.shape[-1]), group_name)
    folded: torch.Tensor = received.transpose(0, 1).reshape(x.shape)
    return folded
