"""vLLM's compilation as on CUDA, for engines of this process on the CPU.

There vLLM compiles a model as one piece, and SP mode not at all. This compiles pieces between attention layers, and a
trace of each mode, through vLLM's pipeline and compile cache: all but what is made for CUDA (kernels, graphs, fusions).
"""

from typing import Any

import torch
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl


def compile_as_on_cuda() -> None:
    """Change the CPU backend of this process."""
    stock_check = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: VllmConfig) -> None:
        compilation = vllm_config.compilation_config
        wanted = compilation.mode
        stock_check(vllm_config)
        if wanted == CompilationMode.VLLM_COMPILE:
            compilation.mode, compilation.backend, compilation.compile_sizes = wanted, "inductor", []
            # These are of CUDA's ops.
            for name, value in vars(compilation.pass_config).items():
                if isinstance(value, bool) and name.startswith(("fuse_", "enable_")):
                    setattr(compilation.pass_config, name, False)

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)
    FixFunctionalizationPass.__call__ = lambda self, graph: None
    # A compiled SP mode pads tokens to a multiple of its ranks. CUDA's kernels go by the slots that there are, and by
    # the tokens of the step, those of the CPU by the rows of keys.
    update = CPUAttentionBackendImpl.do_kv_cache_update

    def do_kv_cache_update(
        self: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        update(self, layer, key[: len(slots)], value[: len(slots)], kv_cache, slots)

    forward = CPUAttentionBackendImpl.forward

    def forward_tokens(
        self: Any,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tokens = len(query) if metadata is None else metadata.num_actual_tokens
        return forward(self, layer, query, key[:tokens], value[:tokens], kv_cache, metadata, *args, **kwargs)

    CPUAttentionBackendImpl.do_kv_cache_update = do_kv_cache_update
    CPUAttentionBackendImpl.forward = forward_tokens
