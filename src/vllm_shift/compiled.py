"""A second ``torch.compile`` trace of the same modules, for SP mode.

vLLM compiles a model once and drops all guards, so a trace holds one mode only: TP mode, as in a stock engine. SP mode
gets a trace of its own from a shallow twin of each compiled module. The twin has the same parameters and submodules,
and goes through vLLM's own pipeline: fusions, compile cache, piecewise CUDA graphs.
"""

import copy
import os
from typing import Any

from torch import nn
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_shift.config import CONFIG_KEY, ShiftConfig
from vllm_shift.overlap import OverlapPass
from vllm_shift.saving import BackgroundSaves

logger = init_logger(f"vllm.{__name__}")


class CompiledTwins:
    """The twins of a model's compiled modules; none where vLLM does not compile piecewise (CPU, eager mode).

    Args:
        model: the model, not yet compiled: its first run must come later.
        vllm_config: the engine's config.
        through_peers: how ranks exchange, which is a part of what is traced.
        groups: names of the exchange and of the groups that SP mode communicates in, a part of it, too.

    Attributes:
        saves: of both traces of each module, to vLLM's compile cache.

    Raises:
        NotImplementedError: vLLM compiles the model as a whole, so that its hooks do not run.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, through_peers: bool, groups: list[str]) -> None:
        self._swaps: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self.saves = BackgroundSaves()
        if vllm_config.compilation_config.mode != CompilationMode.VLLM_COMPILE:
            return
        if isinstance(model, TorchCompileWithNoGuardsWrapper):
            raise NotImplementedError(f"{type(model).__name__} is compiled as a whole; SP mode has no way in")
        sp_config = config_of_twin(vllm_config, through_peers, groups)
        twins: dict[nn.Module, nn.Module] = {}  # of each module one, however many parents it has
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if not isinstance(child, TorchCompileWithNoGuardsWrapper) or child.do_not_compile:
                    continue
                # What encodes images runs before the model's forward pass, so never in SP mode.
                if not child._is_encoder:
                    if child not in twins:
                        twins[child] = _twin(child, sp_config)
                    self._swaps.append((parent, name, child, twins[child]))
        for module in (*twins, *twins.values()):
            self.saves.take_over(module)

    def __bool__(self) -> bool:
        return bool(self._swaps)

    def swap(self, in_sp: bool) -> None:
        """Let the model call the twins, or its own modules again."""
        for parent, name, stock, twin in self._swaps:
            setattr(parent, name, twin if in_sp else stock)


def config_of_twin(vllm_config: VllmConfig, through_peers: bool, groups: list[str]) -> Any:
    """A config that vLLM's compile cache tells from the engine's own, and from that of other traces of SP mode."""
    trace = "-".join(["sp-peers" if through_peers else "sp", *groups])
    config = copy.copy(vllm_config)
    config.compilation_config = compilation = copy.copy(vllm_config.compilation_config)
    if compilation.cache_dir:
        # A directory of the user's own takes the place of vLLM's, which the hash of the config names.
        compilation.cache_dir = os.path.join(compilation.cache_dir, trace)
    settings = vllm_config.additional_config
    dims = ShiftConfig.from_dict(settings[CONFIG_KEY]).dims(0)
    # Sizes and ranges that are compiled for themselves are rows of TP mode; SP mode has one range, of padded rows.
    compilation.compile_sizes = []
    most_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    compilation.compile_ranges_endpoints = [dims.padded_tokens(most_tokens)]
    # vLLM fuses sums over all ranks only, of which SP mode has none.
    compilation.pass_config = copy.copy(compilation.pass_config)
    compilation.pass_config.fuse_allreduce_rms = False
    # No trials of combined kernels, which take seconds: Inductor combines all of less than 0.3 ms, whatever it finds
    # (speedup_by_combo_kernel in torch/_inductor/scheduler.py).
    inductor_config = compilation.inductor_compile_config | {"benchmark_combo_kernel": False}
    if through_peers:
        # vLLM has one place for it, where a pass of the user's own stays.
        passes = {current_platform.pass_key: OverlapPass()}
        if passes.keys() & inductor_config.keys():
            logger.warning(
                "Shift Parallelism: a pass of your own in inductor_compile_config is in the place of OverlapPass, so "
                "SP mode will be slower."
            )
        inductor_config = passes | inductor_config
    compilation.inductor_compile_config = inductor_config
    config.additional_config = settings | {CONFIG_KEY: settings[CONFIG_KEY] | {"trace": trace}}
    return config


def _twin(module: Any, sp_config: Any) -> nn.Module:
    twin = copy.copy(module)
    twin.vllm_config, twin.compilation_config = sp_config, sp_config.compilation_config
    with set_current_vllm_config(sp_config):
        TorchCompileWithNoGuardsWrapper.__init__(twin, module._compile_prefix, module._is_encoder)
    stock_cleanup = module.cleanup

    def cleanup() -> None:
        # vLLM calls it for the modules that it finds in the model of an engine that is deleted; a twin is none.
        stock_cleanup()
        twin.cleanup()

    module.cleanup = cleanup
    return twin  # type: ignore[no-any-return]
