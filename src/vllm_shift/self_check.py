"""Self-check at start-up: the same tokens through both modes must leave the same KV cache and hidden states.

It runs real steps through the stock worker (``prompts.py``), with the attention kernels, compiled traces and CUDA
graphs that serving uses. The reference takes steps of at most the threshold, so they run in TP mode, which is stock
vLLM; then one larger step runs in SP mode over the same KV cache blocks, and once more, without CUDA graphs, if much
larger ones would exchange in another way.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_shift.config import most_step_tokens
from vllm_shift.gathered import gathered_modules
from vllm_shift.layers import SlottedQKVParallelLinear
from vllm_shift.limits import TESTED
from vllm_shift.prompts import Prompts, prompt_lengths, without_kv_connector
from vllm_shift.quantized import quantizes_inputs
from vllm_shift.rounding import (
    AMPLIFIED_ROUNDINGS,
    MOE_SHARE,
    MOST_ALLOWED,
    OUTLIER_SHARE,
    PART_SHARE,
    TOKENS_OF_A_PART,
    allowed_error,
    relative_error,
    round_otherwise,
)
from vllm_shift.switch import ModeSwitch

if TYPE_CHECKING:
    from vllm_shift.peers import PeerMemory

logger = init_logger(f"vllm.{__name__}")

# Tokens a rank to check with at least; where a share of them may differ more, enough for that.
TOKENS_PER_RANK = 8
TOKENS_PER_RANK_OUTLIERS = 32

_EVERYTHING = 1 << 30


@dataclass(frozen=True)
class Difference:
    """Largest difference found at one place.

    Attributes:
        place: name of a layer, or "hidden states".
        layer: number of transformer layers before it.
        error: relative to the length of the vector; infinite where something is missing or not finite.
        allowed: what rounding explains.
    """

    place: str
    layer: int
    error: float
    allowed: float

    @property
    def fails(self) -> bool:
        """Whether rounding does not explain it."""
        return not self.error <= self.allowed

    @property
    def closeness(self) -> float:
        """How close rounding comes to what is allowed; 1 is all of it."""
        return self.error / self.allowed


class SelfCheck:
    """Runs the check on one rank; every rank of the engine has to take part.

    Args:
        worker: the worker, its model loaded and warmed up.
        execute: the stock worker's ``execute_model``.
    """

    _prompts: Prompts
    # Measured by ``_amplify`` when the modes differ by more than is usual.
    _amplified: dict[str, float] | None = None

    def __init__(self, worker: Any, execute: Callable[[SchedulerOutput], Any]) -> None:
        self._worker, self._runner, self._execute = worker, worker.model_runner, execute
        self._switch: ModeSwitch = worker.switch
        model_config = worker.model_config
        self._dtype, self._layers = model_config.dtype, model_config.get_total_num_hidden_layers()
        self._quantizes = quantizes_inputs(worker.model_runner.get_model())
        self._quantizes_cache = is_quantized_kv_cache(worker.cache_config.cache_dtype)
        self._share, self._bounds_outliers = self._outliers(model_config.is_moe)

    @property
    def _quantizes_something(self) -> bool:
        return self._quantizes or self._quantizes_cache

    def _outliers(self, is_moe: bool) -> tuple[float, bool]:
        """The share of the vectors that may differ more than others, and whether by no more than ``MOST_ALLOWED``."""
        exact = self._dtype == torch.float32
        if is_moe and not exact:
            return MOE_SHARE, False
        if exact and not self._quantizes_something:
            return 0.0, True
        # At most half of one rank's tokens, so that a bug of one rank shows.
        return min(OUTLIER_SHARE, 0.5 / self._switch.dims.sp), not self._quantizes_something

    @torch.inference_mode()
    def run(self) -> bool:
        """Compare the modes.

        Returns:
            False where there was nothing to do, because no step of this engine can run in SP mode, or no room to.

        Raises:
            RuntimeError: the modes differ; names the first layer that does. Or there is no room, and the architecture
                is not among the tested ones. Raised on every rank.
            NotImplementedError: a KV cache of a shape that it does not know; names the layer.
        """
        started = time.monotonic()
        scheduler, threshold = self._worker.scheduler_config, self._switch.max_tp_tokens
        most = most_step_tokens(scheduler)
        longest = self._worker.model_config.max_model_len - 1
        if threshold and not scheduler.enable_chunked_prefill:
            longest = min(longest, threshold)  # for the steps in TP mode
        lengths = prompt_lengths(
            threshold,
            self._switch.dims.sp,
            most,
            scheduler.max_num_seqs,
            longest,
            lambda lengths: Prompts(self._worker, self._execute, lengths).fit(),
            TOKENS_PER_RANK_OUTLIERS if self._share else TOKENS_PER_RANK,
        )
        if lengths is None:
            if most > threshold:
                self._report_no_room(threshold + 1, scheduler.max_num_seqs)
            return False
        self._prompts = Prompts(self._worker, self._execute, lengths)
        with without_kv_connector(self._runner):
            differences = self._differences()
        self._prompts.zero_cache()
        if self._worker.rank == 0:
            worst = max(differences, key=lambda difference: difference.closeness)
            logger.info(
                "Shift Parallelism: self-check passed in %.1f s; on %d tokens the modes differ by rounding "
                "(%s: %.1g, allowed %.1g).",
                time.monotonic() - started,
                sum(lengths),
                worst.place,
                worst.error,
                worst.allowed,
            )
        return True

    def _report_no_room(self, tokens: int, most_requests: int) -> None:
        architecture = self._worker.model_config.architecture
        why = (
            f"Shift Parallelism: no self-check, because no prompts of {tokens} tokens together fit into the KV cache "
            f"and into max_num_seqs={most_requests}"
        )
        if architecture not in TESTED:
            raise RuntimeError(
                f"{why}. {architecture} is not among the tested architectures and needs one: allow more KV cache or "
                "requests, or set a lower threshold."
            )
        if self._worker.rank == 0:
            logger.warning("%s.", why)

    def _differences(self) -> list[Difference]:
        """Between the modes, in the order of the layers; raises where one is too large."""
        threshold = self._switch.max_tp_tokens
        # An engine without a TP mode of its own has no trace and no CUDA graphs of it.
        with self._mode(threshold or _EVERYTHING, eager=not threshold):
            reference, cache = self._reference(threshold or _EVERYTHING)
        # Compiled code rounds otherwise than eager code.
        layers_before = int(not threshold)

        def compare() -> list[Difference]:
            found = self._prompts.run(_EVERYTHING)
            return self._compare(reference, found, cache, layers_before)

        def check() -> list[Difference]:
            differences = compare()
            first = _first_failing(differences)
            if first is not None and self._amplified is None:
                self._amplified = self._amplify()
                # What was found once counts, whatever another run finds.
                differences = [self._allow_growth(difference) for difference in differences] + compare()
                first = _first_failing(differences)
            if first is not None:
                raise RuntimeError(self._explain(first))
            return differences

        differences = check()
        peers = self._switch.exchange.peers
        if peers is not None and peers.swap_bytes < math.inf:
            # Graphs of steps of this size have recorded the way without a swap.
            with self._mode(threshold, eager=False, graphs=False), _swapping_everything(peers):
                differences += check()
        return differences

    def _reference(self, most_tokens: int) -> tuple[Any, list[tuple[str, torch.Tensor]]]:
        """What the prompts give, and a copy of what the KV cache then holds."""
        hidden = self._prompts.run(most_tokens)
        return hidden, [(place, x.cpu()) for place, x in self._prompts.read_cache()]

    def _amplify(self) -> dict[str, float]:
        """How far one rounding of the embeddings moves what comes after it in TP mode, by place.

        In most models by little more than it did at first; in a few it grows severalfold in each layer. Vectors that
        may differ more than others are left out: what they differ by says nothing of the others.
        """
        threshold = self._switch.max_tp_tokens or _EVERYTHING
        with self._mode(threshold, eager=True):
            reference, cache = self._reference(threshold)
            hooks = [
                module.register_forward_hook(lambda module, args, output: round_otherwise(output))
                for module in self._runner.get_model().modules()
                if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
            ]
            try:
                found = self._prompts.run(threshold)
            finally:
                for hook in hooks:
                    hook.remove()
            grown = [
                (place, relative_error(expected.to(x.device), x, self._share_of(place)))
                for (place, expected), (_, x) in zip(cache, self._prompts.read_cache(), strict=True)
                if expected.any()
            ]
            if reference is not None and found is not None:
                grown.append(("hidden states", relative_error(reference, found, self._share)))
        amplified: dict[str, float] = {}
        for place, error in grown:
            if error < math.inf:
                # Keys and values of a layer have one name.
                amplified[place] = max(error, amplified.get(place, 0.0))
        if self._worker.rank == 0 and amplified:
            worst = max(amplified, key=lambda place: amplified[place])
            logger.info(
                "Shift Parallelism: the modes differ by more than rounding usually explains. Here one rounding of the "
                "embeddings grows to %.1g (%s) in TP mode; the self-check allows twice as much as it grows to.",
                amplified[worst],
                worst,
            )
        return amplified

    @contextmanager
    def _mode(self, max_tp_tokens: int, eager: bool, graphs: bool = True) -> Iterator[None]:
        """Another threshold; without CUDA graphs unless ``graphs``; with ``eager`` without compiled traces, too."""
        # Both of vLLM's model runners use no graph while this says that there are none.
        owner = getattr(self._runner, "cudagraph_manager", None) or self._runner.cudagraph_dispatcher
        name = "_graphs_captured" if hasattr(owner, "_graphs_captured") else "keys_initialized"
        had_graphs = getattr(owner, name)
        self._switch.eager = eager
        setattr(owner, name, had_graphs and graphs and not eager)
        try:
            with self._switch.threshold(max_tp_tokens):
                yield
        finally:
            setattr(owner, name, had_graphs)
            self._switch.eager = False

    def _compare(
        self,
        reference: torch.Tensor | None,
        found: torch.Tensor | None,
        cache: list[tuple[str, torch.Tensor]],
        layers_before: int,
    ) -> list[Difference]:
        """All differences in the order of the layers; allowed is as much as if ``layers_before`` came before them."""
        # On the CPU, a part holds some keys and some values, and of a single token one part may hold nothing.
        written = {name for name, expected in cache if expected.any()}
        differences = [
            self._difference(name, _layer(name) + layers_before, expected.to(x.device), x, self._share_of(name))
            for (name, expected), (_, x) in zip(cache, self._prompts.read_cache(), strict=True)
            if expected.any() or x.any() or name not in written
        ]
        differences.sort(key=lambda difference: difference.layer)
        if reference is not None and found is not None:
            layer = self._layers + layers_before
            differences.append(self._difference("hidden states", layer, reference, found, self._share))
            if self._share * self._switch.dims.sp >= 1 and len(found) == sum(self._prompts.lengths):
                differences += self._of_parts(layer, reference, found)
        return differences

    def _share_of(self, name: str) -> float:
        """That share of the vectors in an attention layer's KV cache may differ more than others."""
        # Before the first one nothing makes outliers but quantizing.
        return self._share if _layer(name) or self._quantizes_something else 0.0

    def _difference(
        self, place: str, layer: int, expected: torch.Tensor, found: torch.Tensor, share: float
    ) -> Difference:
        allowed = allowed_error(self._dtype, layer, self._quantizes, self._quantizes_cache)
        most = self._allow_growth(Difference(place, layer, relative_error(expected, found, share), allowed))
        if not (share and self._bounds_outliers):
            return most
        outlier = Difference(place, layer, relative_error(expected, found, 0), MOST_ALLOWED)
        return max(most, outlier, key=lambda difference: difference.closeness)

    def _allow_growth(self, difference: Difference) -> Difference:
        """The same difference, with what rounding grows to allowed; nothing has rounded before layer 0."""
        grown = (self._amplified or {}).get(difference.place, 0.0) if difference.layer else 0.0
        allowed = min(AMPLIFIED_ROUNDINGS * grown, MOST_ALLOWED)
        return replace(difference, allowed=max(difference.allowed, allowed))

    def _of_parts(self, layer: int, expected: torch.Tensor, found: torch.Tensor) -> Iterator[Difference]:
        """Of parts of a rank's tokens, where the vectors that may differ more are as many as a rank has.

        Tokens of a rank are consecutive, in two pieces where the model runner has put prompts in another order.
        """
        rows = self._switch.dims.local_tokens(len(found)) // 4
        if rows >= TOKENS_OF_A_PART:
            for begin in range(0, len(found) - rows + 1, rows):
                part = slice(begin, begin + rows)
                error = relative_error(expected[part], found[part], PART_SHARE)
                yield Difference("hidden states of a rank", layer, error, MOST_ALLOWED)

    def _explain(self, first: Difference) -> str:
        located = self._locate()
        where = f"{first.place} is the first to differ (by {first.error:.2g} of a vector's length, {first.allowed:.2g} "
        where += "is rounding)"
        if located is None:
            where += ", and only with compiled traces or CUDA graphs"
        else:
            where += f"; module by module, {located.place} is (by {located.error:.2g}, allowed {located.allowed:.2g})"
        return (
            "Shift Parallelism: the self-check failed, so this engine would give wrong results. The same tokens "
            f"through TP mode and SP mode must give the same values; {where}. Please report it with the model's name; "
            "until then start the server without Ulysses sequence parallelism."
        )

    def _locate(self) -> Difference | None:
        """Run both modes again, every module by itself, and find the first one whose output differs."""
        # By module and call: layers share some modules, as the rotary embedding, which is named after the first.
        outputs: dict[str, Iterator[list[torch.Tensor]]] = {}
        recorded: dict[str, list[list[torch.Tensor]]] = defaultdict(list)
        differences: list[Difference] = []
        dims, tokens = self._switch.dims, sum(self._prompts.lengths)
        sp, rows, own = dims.sp, dims.local_tokens(tokens), dims.local_slice(tokens)
        layer, exchanged = 0, False

        def record(module: nn.Module, name: str, output: Any) -> None:
            nonlocal layer, exchanged
            tensors = [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, torch.Tensor)]
            if not self._switch.in_sp:
                kept = [x[own] if x.dim() and len(x) == tokens else x.new_empty(0) for x in tensors]
                # Copies, because modules change their inputs in place.
                recorded[name].append([x.to("cpu", copy=True) for x in kept])
                return
            layer = max(layer, _layer(name))
            if isinstance(module, SlottedQKVParallelLinear):
                exchanged = self._switch.early
            elif isinstance(module, Attention):  # what it gives has been exchanged back
                exchanged = False
            calls = outputs.setdefault(name, iter(recorded[name]))
            for expected, x in zip(next(calls, []), tensors, strict=False):
                if not len(expected) or not x.dim():
                    continue
                if len(x) == rows * sp and not exchanged:  # folded: this rank's own slot is its TP shard
                    x = x.view(rows, sp, *x.shape[1:])[:, dims.sp_rank]
                elif len(x) in (rows * sp, tokens):
                    x = x[own]
                x = x[: len(expected)]
                if x.shape == expected.shape and x.is_floating_point():
                    # What comes out of a layer has been through its row-parallel parts.
                    before = layer + self._quantizes
                    differences.append(self._difference(name, before, expected.to(x.device), x, self._share))

        model = self._runner.get_model()
        # What runs inside a gathered module has the rows of all tokens, in another order than a folded view.
        inside = tuple(f"{name}." for name, _ in gathered_modules(model))
        hooks = [
            module.register_forward_hook(lambda module, _, output, name=name: record(module, name, output))
            for name, module in model.named_modules()
            if name and not name.startswith(inside)
        ]
        try:
            for max_tp_tokens in (_EVERYTHING, 0):
                with self._mode(max_tp_tokens, eager=True):
                    self._prompts.run(_EVERYTHING)
        finally:
            for hook in hooks:
                hook.remove()
        return _first_failing(differences)


@contextmanager
def _swapping_everything(peers: "PeerMemory") -> Iterator[None]:
    before, peers.swap_bytes = peers.swap_bytes, 0
    try:
        yield
    finally:
        peers.swap_bytes = before


def _layer(name: str) -> int:
    """Number of the transformer layer that a module belongs to; 0 for what comes before all layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _first_failing(differences: list[Difference]) -> Difference | None:
    """The first on the rank that finds one in the lowest layer; the same on all ranks."""
    return _agree(next((difference for difference in differences if difference.fails), None))


def _agree(first: Difference | None) -> Difference | None:
    """Of every rank's first difference the one in the lowest layer; the same on all ranks."""
    world = get_world_group()
    found: list[Difference | None] = [None] * world.world_size
    torch.distributed.all_gather_object(found, first, group=world.cpu_group)
    return min((each for each in found if each is not None), key=lambda each: each.layer, default=None)
