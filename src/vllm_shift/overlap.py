"""The exchange after attention, while the product with what needs no exchange runs.

In SP mode's compiled trace two ops in a row become one: the exchange that brings a rank its tokens' heads, and the
row-parallel product of them, which is usually the output projection. ``peers.py`` has that op's two ways to run.
"""

import torch
from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass


class OverlapPass(InductorPass):
    """Puts ``peers_heads_to_product`` in the place of a ``folded_linear`` of what ``peers_heads_to_tokens`` gives.

    Not where something else reads that, too, as LoRA does, or where the product has a bias.
    """

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
