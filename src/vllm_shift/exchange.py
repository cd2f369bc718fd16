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

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch.distributed import all_to_all_single
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import direct_register_custom_op

if TYPE_CHECKING:  # it needs Triton, which the CPU backend does not have
    from vllm_shift.peers import PeerMemory


# Custom ops take no objects, so an exchange travels by its name, as groups do in vllm/distributed/parallel_state.py.
_exchanges: "WeakValueDictionary[str, Exchange]" = WeakValueDictionary()
_numbers = itertools.count()


class Exchange:
    """The exchange of one engine among the ranks of an SP group.

    Args:
        group: the SP group, which a further engine of this process may have, too.

    Attributes:
        sp: the SP degree, S.
        name: for the custom ops. The same in each start of an engine, as traces in vLLM's compile cache hold it.
        peers: which do it through each other's memory; None where the process group does.
    """

    def __init__(self, group: GroupCoordinator) -> None:
        self.group, self.sp = group, group.world_size
        self.name = f"{group.unique_name}.{next(_numbers)}"
        self.peers: PeerMemory | None = None
        _exchanges[self.name] = self

    def tokens_to_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Before attention: q, k, v from the folded view to the head view, in one exchange.

        Args:
            q, k, v: in the folded view, [n*S, heads * head size] and twice [n*S, KV heads * head size].

        Returns:
            q, k, v in the head view, each of its input's shape and dtype; views of one buffer, rows not contiguous.
        """
        if self.peers is not None:
            received = torch.ops.vllm_shift.peers_tokens_to_heads(q, k, v, self.name)
        else:
            received = self.rows_to_heads((q, k, v))
        q, k, v = received.split([x.size(-1) for x in (q, k, v)], dim=-1)
        return q, k, v

    def rows_to_heads(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tensors [n*S, ...] from the folded view to the head view, side by side: [n*S, all columns]."""
        blocks = [x.view(-1, self.sp, x.size(-1)).transpose(0, 1) for x in rows]
        send = torch.cat(blocks, dim=-1).contiguous()
        received: torch.Tensor = torch.ops.vllm_shift.all_to_all(send, self.name).view(-1, send.size(-1))
        return received

    def heads_to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """After attention: [n*S, heads * head size] from the head view back to the folded view."""
        folded: torch.Tensor
        if self.peers is not None:
            folded = torch.ops.vllm_shift.peers_heads_to_tokens(x, self.name)
        else:
            received = torch.ops.vllm_shift.all_to_all(x.view(self.sp, -1, x.size(-1)), self.name)
            folded = received.transpose(0, 1).reshape(x.shape)
        return folded


def qkv_widths(layer: Attention) -> tuple[int, int, int]:
    """Columns of q, k and v that an attention layer takes: those of the heads of one rank of TP=P."""
    kv_heads = layer.num_kv_heads
    return layer.num_heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.head_size_v


def as_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """``x`` as [rows, width]; itself where it is that already, as even then a reshape takes long to trace."""
    return x if x.dim() == 2 and x.size(1) == width else x.reshape(-1, width)


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


def _peers(name: str) -> "PeerMemory":
    peers = _exchanges[name].peers
    assert peers is not None
    return peers


def _all_to_all(x: torch.Tensor, name: str) -> torch.Tensor:
    """Send block j of ``x`` [S, ...] to SP rank j; block j of the result came from it."""
    received = torch.empty_like(x)
    all_to_all_single(received, x, group=_exchanges[name].group.device_group)
    return received


def _same_shape_fake(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)


def _peers_tokens_to_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, name: str) -> torch.Tensor:
    return _peers(name).tokens_to_heads(q, k, v)


def _peers_tokens_to_heads_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, name: str) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1] + k.shape[1] + v.shape[1])


def _peers_product_to_heads(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, name: str
) -> torch.Tensor:
    return _peers(name).product_to_heads(x, weight, bias)


def _peers_product_to_heads_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, name: str
) -> torch.Tensor:
    sp = _exchanges[name].sp
    return x.new_empty(x.shape[0] * sp, weight.shape[0] // sp)


def _peers_heads_to_tokens(x: torch.Tensor, name: str) -> torch.Tensor:
    return _peers(name).heads_to_tokens(x)


def _peers_heads_to_product(x: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    return _peers(name).heads_to_product(x, weight)


def _peers_heads_to_product_fake(x: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
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
