"""The pass that lets the exchange after attention and the product after it run as one op, on small graphs."""

import pytest
import torch
from test_exchange import PlainPeers, SimpleGroup
from torch import fx

import vllm_shift.layers  # noqa: F401  (registers folded_linear)
from vllm_shift import exchange
from vllm_shift.overlap import OverlapPass

SP, WIDTH, OUT = 2, 3, 5


def graph_of(bias: bool, read_twice: bool, exchanged: bool) -> fx.Graph:
    """(x, weight, bias) -> the product, and the sum of what came if that is read twice."""
    ops, graph = torch.ops.vllm_shift, fx.Graph()
    x, weight, bias_input = (graph.placeholder(name) for name in ("x", "weight", "bias"))
    tokens = graph.call_function(ops.peers_heads_to_tokens.default, (x, "sp")) if exchanged else x
    product = graph.call_function(ops.folded_linear.default, (tokens, weight, bias_input if bias else None))
    graph.output((product, graph.call_function(torch.sum, (tokens,))) if read_twice else (product,))
    return graph


@pytest.mark.parametrize(
    ("bias", "read_twice", "exchanged", "becomes_one"),
    [
        (False, False, True, True),
        (True, False, True, False),
        (False, True, True, False),
        (False, False, False, False),
    ],
)
def test_only_an_exchange_for_one_product_becomes_one_with_it(bias, read_twice, exchanged, becomes_one):
    group = SimpleGroup(unique_name="sp")
    exchange.register_group(group)
    exchange.use_peers(group, PlainPeers())
    graph = graph_of(bias, read_twice, exchanged)
    inputs = torch.randn(4 * SP, WIDTH), torch.randn(OUT, SP * WIDTH), torch.randn(OUT)
    expected = fx.GraphModule({}, graph)(*inputs)
    OverlapPass()(graph)
    graph.lint()
    for found, wanted in zip(fx.GraphModule({}, graph)(*inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    targets = {node.target for node in graph.nodes}
    assert (torch.ops.vllm_shift.peers_heads_to_product.default in targets) is becomes_one
    assert (torch.ops.vllm_shift.folded_linear.default in targets) is not becomes_one
