"""What the self-check runs: prompts of its own, in steps of the stock worker.

They write to KV cache blocks that are zero before and after. The scheduler learns nothing of them, nor does a KV
connector.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm import PoolingParams, SamplingParams
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import EncoderOnlyAttentionSpec
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR


def prompt_lengths(
    max_tp_tokens: int,
    sp: int,
    most_tokens: int,
    most_requests: int,
    most_length: int,
    fits: Callable[[list[int]], bool],
    per_rank: int,
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


class Prompts:
    """Prompts without structure, the same on every rank.

    Args:
        worker: the worker, its model loaded and warmed up.
        execute: the stock worker's ``execute_model``.
        lengths: tokens of each prompt.
    """

    def __init__(self, worker: Any, execute: Callable[[SchedulerOutput], Any], lengths: list[int]) -> None:
        self.lengths = lengths
        self._worker, self._runner, self._execute = worker, worker.model_runner, execute
        self._groups = worker.model_runner.kv_cache_config.kv_cache_groups
        speculative = worker.vllm_config.speculative_config
        # A draft model writes that far beyond a prompt.
        self._drafts = speculative.num_speculative_tokens if speculative else 0
        self._pooling_task = None
        if worker.model_config.runner_type != "generate":
            # The same on every rank, though vLLM's runners have them in the order of a set.
            self._pooling_task = min(self._runner.get_supported_tasks(), default=None)
        # Without chunked prefill, as some ways of pooling need it, prompts are not split here either.
        self._splits = worker.scheduler_config.enable_chunked_prefill

    def fit(self) -> bool:
        """Whether the KV cache has blocks for all of them."""
        return sum(map(len, self._blocks())) < int(self._runner.kv_cache_config.num_blocks)

    def _num_blocks(self, group: Any, length: int) -> int:
        """That a prompt of this length needs in a KV cache group."""
        if isinstance(group.kv_cache_spec, EncoderOnlyAttentionSpec):
            return 0  # attention in both directions keeps nothing
        most = self._worker.model_config.max_model_len
        return int(cdiv(min(length + self._drafts, most), group.kv_cache_spec.block_size))

    def _blocks(self) -> list[list[int]]:
        """KV cache blocks of all prompts by KV cache group. Groups share memory, so no block is used twice."""
        numbers = itertools.count(1)  # block 0 is vLLM's null block
        return [
            list(itertools.islice(numbers, sum(self._num_blocks(group, length) for length in self.lengths)))
            for group in self._groups
        ]

    def run(self, most_tokens: int) -> torch.Tensor | None:
        """Run the prompts, their blocks zero before, in steps of up to ``most_tokens`` tokens.

        Returns:
            Hidden states [tokens, hidden], prompt after prompt, or what is pooled from them, [prompts, size]; None on
            a pipeline rank that has none.

        Raises:
            NotImplementedError: a KV cache of a shape that it does not know; names the layer.
        """
        self.zero_cache()
        names = [f"_shift_self_check_{number}" for number in range(len(self.lengths))]
        blocks = [iter(numbers) for numbers in self._blocks()]
        own_blocks = [
            tuple(
                list(itertools.islice(all_of, self._num_blocks(group, length)))
                for all_of, group in zip(blocks, self._groups, strict=True)
            )
            for length in self.lengths
        ]
        done = [0] * len(self.lengths)
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        while done != self.lengths:
            step = SchedulerOutput.make_empty()
            step.num_common_prefix_blocks = [0] * len(self._groups)
            cached = step.scheduled_cached_reqs
            for number, name in enumerate(names):
                left = self.lengths[number] - done[number]
                tokens = min(left, most_tokens - step.total_num_scheduled_tokens)
                if not tokens or (tokens < left and not self._splits):
                    continue
                if done[number]:
                    cached.req_ids.append(name)
                    cached.new_block_ids.append(None)
                    cached.num_computed_tokens.append(done[number])
                    cached.num_output_tokens.append(0)
                else:
                    step.scheduled_new_reqs.append(self._request(number, name, own_blocks[number]))
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

    def _request(self, number: int, name: str, blocks: tuple[list[int], ...]) -> NewRequestData:
        pooling, vocabulary = self._pooling_task, self._worker.model_config.get_vocab_size()
        length = self.lengths[number]
        tokens = [(index * index + 7919 * index + 104729 * number) % vocabulary for index in range(length)]
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

    def _caches(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name of a layer, its KV cache, and the numbers of the prompts' blocks in it."""
        context = self._worker.vllm_config.compilation_config.static_forward_context
        num_blocks = self._runner.kv_cache_config.num_blocks
        for group, blocks in zip(self._groups, self._blocks(), strict=True):
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

    def zero_cache(self) -> None:
        """Empty their blocks."""
        for _, cache, numbers in self._caches():
            cache.index_fill_(0, numbers, 0)

    def read_cache(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the prompts' blocks hold: vectors [..., size], keys and values apart.

        The CPU backend packs a block, so that there a vector is of several tokens.
        """
        context = self._worker.vllm_config.compilation_config.static_forward_context
        quantized = is_quantized_kv_cache(self._worker.cache_config.cache_dtype)
        own = {*self._runner.get_model().modules(), *self._worker.switch.attention_layers}
        for name, cache, numbers in self._caches():
            if context[name] not in own:
                continue  # of a draft model, which has one mode only
            found = cache.index_select(0, numbers)
            # Not all layers are quantized: the state of a Mamba layer is not, nor are those that a flag names.
            if quantized and found.element_size() == 1:
                found = found.view(current_platform.fp8_dtype()).float()
            # Attention backends store [blocks, heads, block size, key and value].
            for part in found.chunk(2, dim=-1) if found.dim() == 4 else [found]:
                yield name, part


@contextmanager
def without_kv_connector(model_runner: Any) -> Iterator[None]:
    """While open, steps pass the KV connector: what they write is not for its store."""
    of_v2 = getattr(model_runner, "kv_connector", NO_OP_KV_CONNECTOR)
    agent = kv_transfer_state._KV_CONNECTOR_AGENT
    of_v2.set_disabled(True)
    kv_transfer_state._KV_CONNECTOR_AGENT = None
    try:
        yield
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = agent
        of_v2.set_disabled(False)
