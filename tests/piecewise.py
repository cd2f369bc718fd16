"""vLLM's compilation as on CUDA, for engines of this process on the CPU.

There vLLM compiles a model as one piece, and SP mode not at all. This compiles pieces between attention layers, and a
trace of each mode, through vLLM's pipeline and compile cache: all but what is made for CUDA (kernels, graphs, fusions).
"""

from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms.cpu import CpuPlatform


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
    # A compiled SP mode pads tokens to a multiple of its ranks. What writes the KV cache goes by slots on CUDA, and by
    # rows of keys on the CPU.
    stock_write = ops.cpu_attn_reshape_and_cache

    def write(
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: Any,
        value_cache: Any,
        slots: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        stock_write(key[: len(slots)], value[: len(slots)], key_cache, value_cache, slots, *args, **kwargs)

    ops.cpu_attn_reshape_and_cache = write
