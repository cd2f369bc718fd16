"""The one exchange of Ulysses attention: tokens of all heads <-> all tokens of this rank's heads.

Both directions keep the number of rows. With S ranks in the SP group and n rows of hidden states a rank:

- the *folded* view [n*S, w] is what the layers around attention see: row i*S + j is this rank's token i, head
  block j (the heads that SP rank j attends with);
- the *head* view [n*S, w] is what attention sees: row r*n + i is token i of SP rank r, this rank's head block.
  Its first N rows are the N tokens of the step, in order.

Where GPUs reach each other's memory, the custom ops ``peers_*`` do it all (``peers.py``). Elsewhere the all-to-all
alone is one, and what goes before and after it is plain PyTorch, of which Inductor makes one kernel. Custom ops are
opaque to a compiler and recorded by CUDA graphs.
Method: DeepSpeed-Ulysses (arXiv 2309.14509), section 3.1.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch.distributed import all_to_all_single
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import direct_register_custom_op

if TYPE_CHECKING:  # it needs Triton, which the CPU backend does not have
    from vllm_shift.peers import PeerMemory


# Custom ops take no objects, so a group travels by its name, as in vllm/distributed/parallel_state.py.
_groups: WeakValueDictionary[str, GroupCoordinator] = WeakValueDictionary()
_peers: "WeakKeyDictionary[GroupCoordinator, PeerMemory]" = WeakKeyDictionary()


def qkv_widths(layer: Attention) -> tuple[int, int, int]:
    """Columns of q, k and v that an attention layer takes: those of the heads of one rank of TP=P."""
    kv_heads = layer.num_kv_heads
    return layer.num_heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.head_size_v


def as_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """``x`` as [rows, width]; itself where it is that already, as even then a reshape takes long to trace."""
    return x if x.dim() == 2 and x.size(1) == width else x.reshape(-1, width)


def register_group(group: GroupCoordinator) -> str:
    """Make a group known to the ops of this module; returns the name to pass."""
    _groups[group.unique_name] = group
    return str(group.unique_name)


def is_registered(group: GroupCoordinator) -> bool:
    """Whether an engine of this process exchanges, or has exchanged, in a group."""
    return group.unique_name in _groups


def use_peers(group: GroupCoordinator, peers: "PeerMemory") -> None:
    """Make a group's peers known to the ops of this module."""
    _peers[group] = peers


def custom_all_reduce(group: GroupCoordinator) -> Any:
    """vLLM's ``CustomAllreduce`` of a group, which may be disabled; None where it has none."""
    return getattr(group.device_communicator, "ca_comm", None)


def why_not_direct(group: GroupCoordinator) -> str | None:
    """Why GPUs of a group do not reach each other's memory directly, for the log; None where they do.

    They do where vLLM's custom all-reduce runs: on one host, with NVLink between all ranks of the group.
    """
    all_reduce = custom_all_reduce(group)
    if all_reduce is None or all_reduce.disabled:
        return "vLLM's custom all-reduce is off"
    if not all_reduce.fully_connected:
        return "there is no NVLink between all GPUs"
    return None


def peers_of(group_name: str) -> "PeerMemory | None":
    """The peers of a group from ``register_group``; None where its process group exchanges."""
    return _peers.get(_groups[group_name])


def _all_to_all(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """Send block j of ``x`` [S, ...] to SP rank j; block j of the result came from it."""
    received = torch.empty_like(x)
    all_to_all_single(received, x, group=_groups[group_name].device_group)
    return received


def _same_shape_fake(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return torch.empty_like(x)


def _peers_tokens_to_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_name: str) -> torch.Tensor:
    return _peers[_groups[group_name]].tokens_to_heads(q, k, v)


def _peers_tokens_to_heads_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_name: str) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1] + k.shape[1] + v.shape[1])


def _peers_product_to_heads(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group_name: str
) -> torch.Tensor:
    return _peers[_groups[group_name]].product_to_heads(x, weight, bias)


def _peers_product_to_heads_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group_name: str
) -> torch.Tensor:
    sp = _groups[group_name].world_size
    return x.new_empty(x.shape[0] * sp, weight.shape[0] // sp)


def _peers_heads_to_tokens(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return _peers[_groups[group_name]].heads_to_tokens(x)


def _peers_heads_to_product(x: torch.Tensor, weight: torch.Tensor, group_name: str) -> torch.Tensor:
    return _peers[_groups[group_name]].heads_to_product(x, weight)


def _peers_heads_to_product_fake(x: torch.Tensor, weight: torch.Tensor, group_name: str) -> torch.Tensor:
    return x.new_empty(x.numel() // weight.shape[1], weight.shape[0])


_library = torch.library.Library("vllm_shift", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op("all_to_all", _all_to_all, fake_impl=_same_shape_fake, target_lib=_library)
direct_register_custom_op(
    "peers_tokens_to_heads", _peers_tokens_to_heads, fake_impl=_peers_tokens_to_heads_fake, target_lib=_library
)
direct_register_custom_op(
    "peers_product_to_heads", _peers_product_to_heads, fake_impl=_peers_product_to_heads_fake, target_lib=_library
)
direct_register_custom_op(
    "peers_heads_to_tokens", _peers_heads_to_tokens, fake_impl=_same_shape_fake, target_lib=_library
)
direct_register_custom_op(
    "peers_heads_to_product", _peers_heads_to_product, fake_impl=_peers_heads_to_product_fake, target_lib=_library
)


def tokens_to_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sp: int, group_name: str, through_peers: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Before attention: q, k, v from the folded view to the head view, in one exchange.

    Args:
        q, k, v: in the folded view, [n*S, heads * head size] and twice [n*S, KV heads * head size].
        sp: the SP degree, S.
        group_name: the SP group, from ``register_group``.
        through_peers: by the peers of ``use_peers``.

    Returns:
        q, k, v in the head view, each of its input's shape and dtype; views of one buffer, rows not contiguous.
    """
    if through_peers:
        received = torch.ops.vllm_shift.peers_tokens_to_heads(q, k, v, group_name)
    else:
        received = rows_to_heads((q, k, v), sp, group_name)
    q, k, v = received.split([x.size(-1) for x in (q, k, v)], dim=-1)
    return q, k, v


def rows_to_heads(rows: Sequence[torch.Tensor], sp: int, group_name: str) -> torch.Tensor:
    """Tensors [n*S, ...] from the folded view to the head view, side by side: [n*S, all columns]."""
    blocks = [x.view(-1, sp, x.size(-1)).transpose(0, 1) for x in rows]
    send = torch.cat(blocks, dim=-1).contiguous()
    received: torch.Tensor = torch.ops.vllm_shift.all_to_all(send, group_name).view(-1, send.size(-1))
    return received


def heads_to_tokens(x: torch.Tensor, sp: int, group_name: str, through_peers: bool) -> torch.Tensor:
    """After attention: [n*S, heads * head size] from the head view back to the folded view, same shape and dtype."""
    folded: torch.Tensor
    if through_peers:
        folded = torch.ops.vllm_shift.peers_heads_to_tokens(x, group_name)
    else:
        received = torch.ops.vllm_shift.all_to_all(x.view(sp, -1, x.size(-1)), group_name)
        folded = received.transpose(0, 1).reshape(x.shape)
    return folded
