"""What Inductor makes of the exchange's ops in SP mode's compiled trace.

After attention two ops in a row become one, so that the product with what needs no exchange runs meanwhile: the
exchange that brings a rank its tokens' heads, and the row-parallel product of them, which is usually the output
projection. ``peers.py`` has that op's two ways to run.

Before attention an op returns memory that other ranks write to, in which Inductor must not put anything else.
"""

from typing import Any

import torch
from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass

from vllm_shift.config import code_hash


class OverlapPass(InductorPass):
    """Puts ``peers_heads_to_product`` in the place of a ``folded_linear`` of what ``peers_heads_to_tokens`` gives.

    Not where something else reads that, too, as LoRA does, or where the product has a bias.
    """

    def uuid(self) -> str:
        """For PyTorch's caches of compiled graphs, which know nothing of ``never_reuse``."""
        return code_hash()

    def __call__(self, graph: fx.Graph) -> None:
        """Change a graph; vLLM calls it after its own passes."""
        ops = torch.ops.vllm_shift
        for linear in graph.find_nodes(op="call_function", target=ops.folded_linear.default):
            exchange, weight, bias = linear.args
            if exchange.target != ops.peers_heads_to_tokens.default or len(exchange.users) > 1 or bias is not None:
                continue
            x, group_name = exchange.args
            with graph.inserting_before(linear):
                product = graph.call_function(ops.peers_heads_to_product.default, (x, weight, group_name))
            product.meta.update(linear.meta)
            linear.replace_all_uses_with(product)
            graph.erase_node(linear)
            graph.erase_node(exchange)


def never_reuse(op: torch._ops.OpOverload) -> None:
    """Let Inductor put nothing else where the one output of a custom op is, not even once it has been read."""
    # Here, as an engine that compiles nothing does without.
    from torch._inductor import lowering
    from torch._inductor.virtualized import V
    from torch._library.utils import get_layout_constraint_tag

    # What Inductor does itself, once it meets an op that it does not know.
    constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
    lowering.make_fallback(op, layout_constraint=constraint)  # type: ignore[no-untyped-call]
    call = lowering.lowerings[op]

    @lowering.register_lowering(op, type_promotion_kind=None)
    def call_and_keep(*args: Any) -> Any:
        output = call(*args)
        V.graph.never_reuse_buffers.add(output.get_name())
        return output
