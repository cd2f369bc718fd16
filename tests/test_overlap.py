"""What Inductor makes of the exchange's ops: two in a row, on small graphs; memory that is not its own, compiled."""

import pytest
import torch
from test_exchange import PlainPeers, exchange_through
from torch import fx
from vllm.utils.torch_utils import direct_register_custom_op

import vllm_shift.layers  # noqa: F401  (registers folded_linear)
from vllm_shift.overlap import OverlapPass, never_reuse

SP, WIDTH, OUT = 2, 3, 5


def graph_of(bias: bool, read_twice: bool, exchange: str | None) -> fx.Graph:
    """(x, weight, bias) -> the product, and the sum of what came if that is read twice."""
    ops, graph = torch.ops.vllm_shift, fx.Graph()
    x, weight, bias_input = (graph.placeholder(name) for name in ("x", "weight", "bias"))
    tokens = graph.call_function(ops.peers_heads_to_tokens.default, (x, exchange)) if exchange else x
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
    exchange = exchange_through(PlainPeers())
    graph = graph_of(bias, read_twice, exchange.name if exchanged else None)
    inputs = torch.randn(4 * SP, WIDTH), torch.randn(OUT, SP * WIDTH), torch.randn(OUT)
    expected = fx.GraphModule({}, graph)(*inputs)
    OverlapPass()(graph)
    graph.lint()
    for found, wanted in zip(fx.GraphModule({}, graph)(*inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    targets = {node.target for node in graph.nodes}
    assert (torch.ops.vllm_shift.peers_heads_to_product.default in targets) is becomes_one
    assert (torch.ops.vllm_shift.folded_linear.default in targets) is not becomes_one


@pytest.mark.parametrize("kept", [False, True])
def test_nothing_else_is_put_where_the_output_of_an_op_is(kept, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    memory = torch.zeros(64, 8)

    def receive(x: torch.Tensor) -> torch.Tensor:
        return memory.copy_(x)

    def receive_fake(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    name, library = f"receive_{kept}", torch.library.Library("vllm_shift_tests", "FRAGMENT")
    direct_register_custom_op(name, receive, fake_impl=receive_fake, target_lib=library)
    op = getattr(torch.ops.vllm_shift_tests, name)
    if kept:
        never_reuse(op.default)

    def piece(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Of one size with what is received: what is made of that, in its place, and what lives on.
        rotated = op(x).cos()
        return rotated @ rotated.t(), x.view(8, 64).t().softmax(0)

    x = torch.randn(64, 8)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(piece, fullgraph=True)(x)
    # Inductor does so elsewhere, or this test would show nothing.
    assert torch.equal(memory, x) is kept
    for found, wanted in zip(compiled, piece(x), strict=True):
        torch.testing.assert_close(found, wanted)
