"""Quantized linear layers: vLLM's own quantization method for each mode, on one copy of the weights where that works.

A method packs, transposes and scales a weight as its kernels want it, so what it makes of a TP=P shard need not be a
part of what it makes of the TP=T shard. So each layer gets a second one of TP=T, the *whole*. The checkpoint's shards
are loaded into slots (``slots.py``), as without quantization; vLLM's method then processes both layers. Where the TP=P
weight came out as a dense slice of the whole, it becomes a view of it; otherwise both are kept, and the log says so.
"""

import inspect
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization.online.fp8 import Fp8PerTensorOnlineLinearMethod
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from vllm_shift.dims import ParallelDims
from vllm_shift.exchange import as_rows
from vllm_shift.slots import Impersonate, Slots

# vLLM's classes whose layers are known to work (those of compressed-tensors are called schemes), and whether they
# quantize the layer's input, too.
METHODS = {
    "AutoAWQMarlinLinearMethod": False,
    "AutoGPTQLinearMethod": False,
    "CompressedTensorsW8A8Fp8": True,
    "CompressedTensorsW8A8Int8": True,
    "CompressedTensorsWNA16": False,
    "Fp8LinearMethod": True,
    "Fp8PerTensorOnlineLinearMethod": True,
    "ModelOptFp8LinearMethod": True,
    "ModelOptFp8PbWoLinearMethod": True,
    "ModelOptFp8PcPtLinearMethod": True,
}


def method_name(layer: Any, method: Any) -> str:
    """The class of a layer's quantization method, or of its scheme."""
    return type(layer.scheme if type(method).__name__ == "CompressedTensorsLinearMethod" else method).__name__


def check_method(layer: Any) -> None:
    """Refuse a layer whose quantization method is not known to work.

    Raises:
        NotImplementedError: names the layer, the method, and those that would work.
    """
    if (name := method_name(layer, layer.quant_method)) not in METHODS:
        raise NotImplementedError(
            f"{layer.prefix}: Shift Parallelism does not support {name}; it supports {', '.join(METHODS)}"
        )


def quantizes_inputs(model: nn.Module) -> bool:
    """Whether a layer of the model quantizes its input, so that the modes round differently."""
    wholes = [module for module in model.modules() if isinstance(module, WholeLinear)]
    # vLLM's kernels of INT4 on CPUs with AMX do, whatever the method.
    return any(METHODS[method_name(whole, whole.method)] or getattr(whole, "use_w4a8", False) for whole in wholes)


class WholeLinear(LinearBase):
    """The TP=T weight of a layer, with a quantization method of its own; a holder of parameters without a forward.

    Args:
        layer: the TP=P layer, as vLLM created it.
        column: whether its outputs are sharded, else its inputs are. The outputs of all slots follow each other.

    Attributes:
        method: vLLM's quantization method of this layer.
    """

    def __init__(self, layer: Any, column: bool) -> None:
        super().__init__(
            layer.input_size,
            layer.output_size,
            layer.has_bias,
            layer.skip_bias_add,
            layer.params_dtype,
            layer.quant_config,
            layer.prefix,
        )
        # Not as ``quant_method`` until weights are loaded: vLLM would process this module, too.
        self.method: Any = self.__dict__.pop("quant_method")
        self.quant_method: Any = None
        dims: ParallelDims = layer.switch.dims
        self.tp_size, self.tp_rank = dims.tp, dims.tp_rank
        self.allow_fp8_block_shape_mismatch = layer.allow_fp8_block_shape_mismatch
        in_slots, out_slots = (1, dims.sp) if column else (dims.sp, 1)
        self.input_size_per_partition = layer.input_size_per_partition * in_slots
        self.output_partition_sizes = layer.output_partition_sizes * out_slots
        self.output_size_per_partition = sum(self.output_partition_sizes)
        with torch.device("meta"):
            self.method.create_weights(
                layer=self,
                input_size_per_partition=self.input_size_per_partition,
                output_partition_sizes=self.output_partition_sizes,
                input_size=layer.input_size,
                output_size=layer.output_size,
                params_dtype=layer.params_dtype,
                weight_loader=default_weight_loader,
            )
            bias = None
            if layer.bias is not None:
                bias = nn.Parameter(torch.empty(self.output_size_per_partition, dtype=layer.bias.dtype))
        self.register_parameter("bias", bias)
        # Its weights come from the slots, also where vLLM quantizes them online.
        get_layerwise_info(self).reset()

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing, as what is here is made of the layer's own; vLLM's dummy loader fills all that is in one."""
        return {} if destination is None else destination

    def finish(self) -> None:
        """When weights are loaded: vLLM sees a layer like its own, whose kernels it may warm up."""
        self.quant_method = self.method

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product with ``x``, [n, input size of TP=T] or folded, in vLLM's own way: [n, output size of TP=T]."""
        out: torch.Tensor = self.method.apply(self, as_rows(x, self.input_size_per_partition), bias)
        return out

    def fill(self, name: str, data: torch.Tensor) -> None:
        """Give a parameter memory, with vLLM's class and attributes kept."""
        empty = getattr(self, name)
        data.__class__, data.__dict__ = empty.__class__, empty.__dict__.copy()
        setattr(self, name, data)


class OnlineSlots(Slots):
    """Slots of a parameter that is on the meta device at first: vLLM counts what is loaded, then loads in earnest."""

    def load(self, param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """As the other slots, in the memory that vLLM has given to ``param`` by then."""
        if not param.is_meta:
            self.materialize(param)
        super().load(param, loaded_weight, *args, **kwargs)

    def materialize(self, param: Any) -> None:
        """Take the memory of ``param``, in which vLLM has put it, as this rank's slot."""
        if self.whole.is_meta:
            own, self._param = param.data, param
            self.whole = torch.empty_like(self.whole, device=param.device)
            self[self._dims.sp_rank].copy_(own)
            param.data = self[self._dims.sp_rank]


class TwoModeMethod(LinearMethodBase):
    """Stands in for a layer's quantization method until the weights are loaded.

    Args:
        layer: a ``SlottedLinear`` as vLLM created it, of TP=P; its parameters get slots.
        column: whether its outputs are sharded, else its inputs are.
        is_dummy: whether vLLM fills parameters by itself instead of loading them.

    Raises:
        NotImplementedError: shards of a parameter do not join into that of TP=T.
    """

    def __init__(self, layer: Any, column: bool, is_dummy: bool) -> None:
        self._stock, self._dims, self._is_dummy = layer.quant_method, layer.switch.dims, is_dummy
        self.uses_meta_device = self._stock.uses_meta_device
        self._whole = WholeLinear(layer, column)
        if self.uses_meta_device and column and layer.bias is not None:
            _move_to_meta(layer, "bias")
        self._slots: dict[str, Slots] = {}
        for name, param in layer.named_parameters(recurse=False):
            if (dim := self._sharded_dim(layer.prefix, name, param)) is not None:
                self._slots[name] = self._make_slots(param, dim, layer.impersonate)
        if self.uses_meta_device:
            # vLLM wraps the loaders, now those of the slots, once more.
            initialize_online_processing(layer)

    def _sharded_dim(self, prefix: str, name: str, param: torch.Tensor) -> int | None:
        whole = getattr(self._whole, name).shape
        changed = [dim for dim, size in enumerate(param.shape) if whole[dim] != size]
        if not changed:
            return None
        if len(changed) > 1 or whole[changed[0]] != self._dims.sp * param.shape[changed[0]]:
            raise NotImplementedError(
                f"{prefix}: shards of its {name}, {list(param.shape)} with TP={self._dims.world}, do not join to "
                f"{list(whole)} with TP={self._dims.tp}"
            )
        return changed[0]

    def _make_slots(self, param: Any, dim: int, impersonate: Impersonate) -> Slots:
        if param.is_meta:
            # Without what initialize_online_processing has put around it.
            param.weight_loader = inspect.unwrap(param.weight_loader)
            return OnlineSlots(param, dim, self._dims, impersonate)
        initial = param.data
        slots = Slots(param, dim, self._dims, impersonate)
        # Methods tell scales that a checkpoint does not have by their initial value.
        slots[self._dims.sp_rank].copy_(initial)
        slots.repeat_own()
        return slots

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """Not called: the stock method has created the weights."""
        raise NotImplementedError

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Not called: the stock method is in place again once the weights are processed."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        """Have vLLM's method process both layers, make TP=P's weights views of TP=T's where it can be done."""
        loaded = 0
        for name, param in list(layer.named_parameters(recurse=False)):
            data, slots = param.data, self._slots.pop(name, None)
            if slots is not None:
                if isinstance(slots, OnlineSlots):
                    slots.materialize(param)
                if self._is_dummy:
                    slots.repeat_own()
                data = slots.whole
                slots.release()
            param.data = param.data.contiguous()
            # Methods change what they are given.
            self._whole.fill(name, data.clone(memory_format=torch.contiguous_format))
            loaded += 0 if name == "bias" else param.nbytes
        del slots, data  # whose memory the methods may need for what they make
        self._whole.method.process_weights_after_loading(self._whole)
        self._stock.process_weights_after_loading(layer)
        shared = share(layer, self._whole, isinstance(self._stock, Fp8PerTensorOnlineLinearMethod))
        layer.second_copy = 0 if shared else loaded
        layer.whole, layer.quant_method = self._whole, self._stock


def share(layer: Any, whole: Any, has_own_scales: bool) -> bool:
    """Make processed TP=P weights views of the whole's, where they are dense slices of it.

    Only weights: scales are small, and some kernels keep pointers to them.

    Args:
        layer: with TP=P's parameters.
        whole: with TP=T's.
        has_own_scales: the weights were quantized here, with one scale each, so TP=P can take over TP=T's.

    Returns:
        Whether there was anything to share.
    """
    dims, shared = layer.switch.dims, False
    for name, of_whole in whole.named_parameters(recurse=False):
        param = layer._parameters.get(name)
        if param is None or (param.is_floating_point() and param.itemsize > 1):
            continue
        dim = next((dim for dim, size in enumerate(param.shape) if of_whole.shape[dim] == dims.sp * size), None)
        if dim is None:
            continue
        part = of_whole.data.narrow(dim, dims.sp_rank * param.shape[dim], param.shape[dim])
        if part.shape != param.shape or part.stride() != param.stride():
            continue
        if has_own_scales and param.is_floating_point():
            layer.weight_scale.data.copy_(whole.weight_scale.data)
        elif not torch.equal(_bits(part), _bits(param.data)):
            continue
        param.data = part
        shared = True
    return shared


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.itemsize == 1 else x


def _move_to_meta(layer: nn.Module, name: str) -> None:
    """Put a parameter where vLLM's online quantization expects those that it counts before it loads them."""
    param = getattr(layer, name)
    meta = nn.Parameter(param.data.to("meta"), requires_grad=False)
    meta.__dict__.update(param.__dict__)
    setattr(layer, name, meta)
