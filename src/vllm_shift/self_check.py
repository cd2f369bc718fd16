"""Self-check at start-up: the same tokens through both modes must leave the same KV cache and hidden states.

It runs real steps through the stock worker, with the attention kernels, compiled traces and CUDA graphs that serving
uses. The reference takes steps of at most the threshold, so they run in TP mode, which is stock vLLM; then one larger
step runs in SP mode over the same KV cache blocks, and once more, without CUDA graphs, if much larger ones would
exchange in another way. All write blocks that were zero and are zero again afterwards, and the scheduler never learns
of it.
"""

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm import PoolingParams, SamplingParams
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import EncoderOnlyAttentionSpec
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR

from vllm_shift.config import most_step_tokens
from vllm_shift.gathered import gathered_modules
from vllm_shift.layers import SlottedQKVParallelLinear
from vllm_shift.limits import TESTED
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


def prompt_lengths(
    max_tp_tokens: int,
    sp: int,
    most_tokens: int,
    most_requests: int,
    most_length: int,
    fits: Callable[[list[int]], bool],
    per_rank: int = TOKENS_PER_RANK,
) -> list[int] | None:
    """Lengths of the prompts that run in one step of SP mode.

    Args:
        max_tp_tokens: the threshold.
        sp: SP degree; the prompts together are not a multiple of it where possible, so that some rows are padding.
        most_tokens: largest number of tokens in a step.
        most_requests: largest number of requests in a step.
        most_length: largest length of a prompt.
        fits: whether the KV cache holds prompts of these lengths.
        per_rank: number of tokens a rank to have at least, where possible.

    Returns:
        None if the engine can run no step above the threshold.
    """
    least = max_tp_tokens + 1
    wanted = max(least, per_rank * sp + 1)
    wanted += wanted % sp == 0
    wanted = max(least, min(wanted, most_tokens))
    for total, requests in itertools.product((wanted, least), (3, 1)):
        count = max(min(requests, most_requests), cdiv(total, most_length))
        lengths = [total // count + (number < total % count) for number in range(count)]
        if total <= most_tokens and count <= most_requests and min(lengths) > 0 and fits(lengths):
            return lengths
    return None


class SelfCheck:
    """Runs the check on one rank; every rank of the engine has to take part.

    Args:
        worker: the worker, its model loaded and warmed up.
        execute: the stock worker's ``execute_model``.
    """

    # Measured by ``_amplify`` when the modes differ by more than is usual.
    _amplified: dict[str, float] | None = None

    def __init__(self, worker: Any, execute: Callable[[SchedulerOutput], Any]) -> None:
        self._worker, self._runner, self._execute = worker, worker.model_runner, execute
        self._switch: ModeSwitch = worker.switch
        self._groups = worker.model_runner.kv_cache_config.kv_cache_groups
        model_config = worker.model_config
        self._dtype, self._layers = model_config.dtype, model_config.get_total_num_hidden_layers()
        self._quantizes = quantizes_inputs(worker.model_runner.get_model())
        self._quantizes_cache = is_quantized_kv_cache(worker.cache_config.cache_dtype)
        self._share, self._bounds_outliers = self._outliers(model_config.is_moe)
        self._vocabulary = model_config.get_vocab_size()
        speculative = worker.vllm_config.speculative_config
        # A draft model writes that far beyond a prompt.
        self._drafts = speculative.num_speculative_tokens if speculative else 0
        self._pooling_task = None
        if model_config.runner_type != "generate":
            # The same on every rank, though vLLM's runners have them in the order of a set.
            self._pooling_task = min(self._runner.get_supported_tasks(), default=None)
        # Without chunked prefill, as some ways of pooling need it, prompts are not split here either.
        self._whole_prompts = not worker.scheduler_config.enable_chunked_prefill

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
        if self._whole_prompts and threshold:
            longest = min(longest, threshold)  # for the steps in TP mode
        lengths = prompt_lengths(
            threshold,
            self._switch.dims.sp,
            most,
            scheduler.max_num_seqs,
            longest,
            lambda found: sum(map(len, self._blocks(found))) < self._runner.kv_cache_config.num_blocks,
            TOKENS_PER_RANK_OUTLIERS if self._share else TOKENS_PER_RANK,
        )
        if lengths is None:
            if most > threshold:
                self._report_no_room(threshold + 1, scheduler.max_num_seqs)
            return False
        with self._without_kv_connector():
            differences = self._differences(lengths)
        self._zero_cache(lengths)
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

    def _differences(self, lengths: list[int]) -> list[Difference]:
        """Between the modes, in the order of the layers; raises where one is too large."""
        threshold = self._switch.max_tp_tokens
        # An engine without a TP mode of its own has no trace and no CUDA graphs of it.
        with self._mode(threshold or _EVERYTHING, eager=not threshold):
            reference, cache = self._reference(lengths, threshold or _EVERYTHING)
        # Compiled code rounds otherwise than eager code.
        layers_before = int(not threshold)

        def compare() -> list[Difference]:
            found = self._process(lengths, _EVERYTHING)
            return self._compare(lengths, reference, found, cache, layers_before)

        def check() -> list[Difference]:
            differences = compare()
            first = _first_failing(differences)
            if first is not None and self._amplified is None:
                self._amplified = self._amplify(lengths)
                # What was found once counts, whatever another run finds.
                differences = [self._allow_growth(difference) for difference in differences] + compare()
                first = _first_failing(differences)
            if first is not None:
                raise RuntimeError(self._explain(first, lengths))
            return differences

        differences = check()
        peers = self._switch.exchange.peers
        if peers is not None and peers.swap_bytes < math.inf:
            # Graphs of steps of this size have recorded the way without a swap.
            with self._mode(threshold, eager=False, graphs=False), _swapping_everything(peers):
                differences += check()
        return differences

    def _reference(self, lengths: list[int], most_tokens: int) -> tuple[Any, list[tuple[str, torch.Tensor]]]:
        """What ``_process`` returns, and a copy of what the KV cache then holds, see ``_read_cache``."""
        hidden = self._process(lengths, most_tokens)
        return hidden, [(place, x.cpu()) for place, x in self._read_cache(lengths)]

    def _amplify(self, lengths: list[int]) -> dict[str, float]:
        """How far one rounding of the embeddings moves what comes after it in TP mode, by place.

        In most models by little more than it did at first; in a few it grows severalfold in each layer. Vectors that
        may differ more than others are left out: what they differ by says nothing of the others.
        """
        threshold = self._switch.max_tp_tokens or _EVERYTHING
        with self._mode(threshold, eager=True):
            reference, cache = self._reference(lengths, threshold)
            hooks = [
                module.register_forward_hook(lambda module, args, output: round_otherwise(output))
                for module in self._runner.get_model().modules()
                if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
            ]
            try:
                found = self._process(lengths, threshold)
            finally:
                for hook in hooks:
                    hook.remove()
            grown = [
                (place, relative_error(expected.to(x.device), x, self._share_of(place)))
                for (place, expected), (_, x) in zip(cache, self._read_cache(lengths), strict=True)
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
    def _without_kv_connector(self) -> Iterator[None]:
        """Its scheduler knows nothing of these steps, and what they write is not for its store."""
        of_v2 = getattr(self._runner, "kv_connector", NO_OP_KV_CONNECTOR)
        agent = kv_transfer_state._KV_CONNECTOR_AGENT
        of_v2.set_disabled(True)
        kv_transfer_state._KV_CONNECTOR_AGENT = None
        try:
            yield
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = agent
            of_v2.set_disabled(False)

    def _count(self, group: Any, length: int) -> int:
        if isinstance(group.kv_cache_spec, EncoderOnlyAttentionSpec):
            return 0  # attention in both directions keeps nothing
        most = self._worker.model_config.max_model_len
        return int(cdiv(min(length + self._drafts, most), group.kv_cache_spec.block_size))

    def _blocks(self, lengths: list[int]) -> list[list[int]]:
        """KV cache blocks of all prompts by KV cache group. Groups share memory, so no block is used twice."""
        numbers = itertools.count(1)  # block 0 is vLLM's null block
        return [
            list(itertools.islice(numbers, sum(self._count(group, length) for length in lengths)))
            for group in self._groups
        ]

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

    def _process(self, lengths: list[int], most_tokens: int) -> torch.Tensor | None:
        """Run the prompts, their blocks zero before, in steps of up to ``most_tokens`` tokens.

        Returns:
            Hidden states [tokens, hidden], prompt after prompt, or what is pooled from them, [prompts, size]; None on
            a pipeline rank that has none.
        """
        self._zero_cache(lengths)
        names = [f"_shift_self_check_{number}" for number in range(len(lengths))]
        blocks = [iter(numbers) for numbers in self._blocks(lengths)]
        own_blocks = [
            tuple(
                list(itertools.islice(all_of, self._count(group, length)))
                for all_of, group in zip(blocks, self._groups, strict=True)
            )
            for length in lengths
        ]
        done = [0] * len(lengths)
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        while done != lengths:
            step = SchedulerOutput.make_empty()
            step.num_common_prefix_blocks = [0] * len(self._groups)
            cached = step.scheduled_cached_reqs
            for number, name in enumerate(names):
                left = lengths[number] - done[number]
                tokens = min(left, most_tokens - step.total_num_scheduled_tokens)
                if not tokens or (self._whole_prompts and tokens < left):
                    continue
                if done[number]:
                    cached.req_ids.append(name)
                    cached.new_block_ids.append(None)
                    cached.num_computed_tokens.append(done[number])
                    cached.num_output_tokens.append(0)
                else:
                    step.scheduled_new_reqs.append(self._request(number, name, lengths[number], own_blocks[number]))
                step.num_scheduled_tokens[name] = tokens
                step.total_num_scheduled_tokens += tokens
                done[number] += tokens
            for name, hidden in self._run_step(step):
                rows[name].append(hidden)
        end = SchedulerOutput.make_empty()
        end.finished_req_ids = set(names)
        self._execute(end)
        found = [hidden for name in names for hidden in rows[name]]
        return torch.cat(found) if found else None

    def _request(self, number: int, name: str, length: int, blocks: tuple[list[int], ...]) -> NewRequestData:
        # Without structure, and the same on every rank.
        pooling = self._pooling_task
        tokens = [(index * index + 7919 * index + 104729 * number) % self._vocabulary for index in range(length)]
        return NewRequestData(
            req_id=name,
            prompt_token_ids=tokens,
            mm_features=[],
            sampling_params=None if pooling else SamplingParams(temperature=0.0, max_tokens=1),
            pooling_params=PoolingParams(task=pooling) if pooling else None,
            block_ids=blocks,
            num_computed_tokens=0,
            lora_request=None,
            prefill_token_ids=tokens,
        )

    def _run_step(self, step: SchedulerOutput) -> Iterator[tuple[str, torch.Tensor]]:
        """Hidden states of the step's tokens by request, or what a pooling model makes of finished prompts."""
        output = self._execute(step)
        state = self._runner.execute_model_state
        # Between pipeline stages there are intermediate tensors instead.
        if state is not None and isinstance(state.hidden_states, torch.Tensor):
            # The model runners sort requests; V2 keeps the order with the step, V1 in its persistent batch.
            batch = getattr(state, "input_batch", None) or self._runner.input_batch
            names = list(batch.req_ids)
            counts = [step.num_scheduled_tokens[name] for name in names]
            hidden: Any = state.hidden_states[: sum(counts)].clone()
            yield from zip(names, hidden.split(counts), strict=True)
        if output is None:
            self._worker.sample_tokens(None)
        elif self._pooling_task:
            if isinstance(output, AsyncModelRunnerOutput):
                output = output.get_output()
            for name, pooled in zip(output.req_ids, output.pooler_output, strict=True):
                if pooled is not None:
                    yield name, pooled.reshape(-1, pooled.shape[-1])

    def _caches(self, lengths: list[int]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name of a layer, its KV cache, and the numbers of the prompts' blocks in it."""
        context = self._worker.vllm_config.compilation_config.static_forward_context
        num_blocks = self._runner.kv_cache_config.num_blocks
        for group, blocks in zip(self._groups, self._blocks(lengths), strict=True):
            for name in group.layer_names if blocks else ():
                caches = context[name].kv_cache
                if getattr(context[name], "kv_cache_dtype", None) == "fp8_ds_mla":
                    raise NotImplementedError(f"{name}: a KV cache fp8_ds_mla; set --kv-cache-dtype bfloat16")
                for cache in caches if isinstance(caches, list | tuple) else [caches]:
                    # An attention backend may divide a block into several of its own.
                    parts = len(cache) // num_blocks
                    if parts * num_blocks != len(cache) or not parts:
                        raise NotImplementedError(f"{name}: the self-check does not know a KV cache {cache.shape}")
                    numbers = torch.tensor(blocks, device=cache.device).unsqueeze(1) * parts
                    yield name, cache, (numbers + torch.arange(parts, device=cache.device)).flatten()

    def _zero_cache(self, lengths: list[int]) -> None:
        for _, cache, numbers in self._caches(lengths):
            cache.index_fill_(0, numbers, 0)

    def _read_cache(self, lengths: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
        """What the prompts' blocks hold: vectors [..., size], keys and values apart.

        The CPU backend packs a block, so that there a vector is of several tokens.
        """
        context = self._worker.vllm_config.compilation_config.static_forward_context
        own = {*self._runner.get_model().modules(), *self._switch.attention_layers}
        for name, cache, numbers in self._caches(lengths):
            if context[name] not in own:
                continue  # of a draft model, which has one mode only
            found = cache.index_select(0, numbers)
            # Not all layers are quantized: the state of a Mamba layer is not, nor are those that a flag names.
            if self._quantizes_cache and found.element_size() == 1:
                found = found.view(current_platform.fp8_dtype()).float()
            # Attention backends store [blocks, heads, block size, key and value].
            for part in found.chunk(2, dim=-1) if found.dim() == 4 else [found]:
                yield name, part

    def _compare(
        self,
        lengths: list[int],
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
            for (name, expected), (_, x) in zip(cache, self._read_cache(lengths), strict=True)
            if expected.any() or x.any() or name not in written
        ]
        differences.sort(key=lambda difference: difference.layer)
        if reference is not None and found is not None:
            layer = self._layers + layers_before
            differences.append(self._difference("hidden states", layer, reference, found, self._share))
            if self._share * self._switch.dims.sp >= 1 and len(found) == sum(lengths):
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

    def _explain(self, first: Difference, lengths: list[int]) -> str:
        located = self._locate(lengths)
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

    def _locate(self, lengths: list[int]) -> Difference | None:
        """Run both modes again, every module by itself, and find the first one whose output differs."""
        # By module and call: layers share some modules, as the rotary embedding, which is named after the first.
        outputs: dict[str, Iterator[list[torch.Tensor]]] = {}
        recorded: dict[str, list[list[torch.Tensor]]] = defaultdict(list)
        differences: list[Difference] = []
        sp, sp_rank = self._switch.dims.sp, self._switch.dims.sp_rank
        rows = self._switch.dims.local_tokens(sum(lengths))
        own = self._switch.dims.local_slice(sum(lengths))
        layer, exchanged = 0, False

        def record(module: nn.Module, name: str, output: Any) -> None:
            nonlocal layer, exchanged
            tensors = [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, torch.Tensor)]
            if not self._switch.in_sp:
                kept = [x[own] if x.dim() and len(x) == sum(lengths) else x.new_empty(0) for x in tensors]
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
                    x = x.view(rows, sp, *x.shape[1:])[:, sp_rank]
                elif len(x) in (rows * sp, sum(lengths)):
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
                    self._process(lengths, _EVERYTHING)
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
