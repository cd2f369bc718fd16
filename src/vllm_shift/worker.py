"""vLLM's stock workers with the mode switch built in; ``ParallelConfig.worker_cls`` names them."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import GroupCoordinator, get_tp_group, get_world_group, init_model_parallel_group
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.worker_base import WorkerBase

from vllm_shift.agreement import VARIABLE, StepCheck, check_settings, debug_wanted
from vllm_shift.calibrate import calibrate
from vllm_shift.config import CONFIG_KEY, ShiftConfig, code_hash
from vllm_shift.exchange import custom_all_reduce, why_not_direct
from vllm_shift.failure import describe_failure, describe_step, failed_captures_end_at_once
from vllm_shift.gathered import inside_gathered
from vllm_shift.graphs import fit_to_graphs, graph_memory, limit_splits, padded_sizes
from vllm_shift.layers import check_layers, slotted_layers, stock_layers, stop_shifting, unfold, why_not_early
from vllm_shift.limits import TESTED
from vllm_shift.lora import attach_adapters
from vllm_shift.metrics import open_counts
from vllm_shift.owner import end_with_owner, end_within
from vllm_shift.quantized import WholeLinear
from vllm_shift.self_check import SelfCheck
from vllm_shift.slots import Slots
from vllm_shift.stats import StepCounter
from vllm_shift.stuck import StuckStepWatch
from vllm_shift.switch import ModeSwitch
from vllm_shift.timing import ClockMark, CudaDevice, CudaMark

logger = init_logger(f"vllm.{__name__}")

# Seconds in which an engine that fails to start may end in order. By default vLLM's executor needs 9 to kill workers.
START_GRACE = 10
# Seconds in which a rank may end in order after a step that failed, before others see their time-outs.
STEP_GRACE_CUDA, STEP_GRACE_CPU = 2, 4
# Seconds before vLLM's executor runs out of patience at which a worker that ends stops waiting for its device, and how
# many it has then.
SHUTDOWN_MARGIN, SHUTDOWN_GRACE = 3, 1


class ShiftWorkerMixin(WorkerBase):
    """Adds Shift Parallelism to a stock vLLM worker. The stock worker must come after it in the bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What shutdown closes is here, because init_device may fail and shutdown comes nevertheless.
        mark, device = (CudaMark, CudaDevice) if current_platform.is_cuda() else (ClockMark, None)
        counts = open_counts(self.vllm_config) if self.rank == 0 else None
        self.shift_counter = StepCounter(mark, counts)
        self._shift_groups: list[GroupCoordinator] = []
        self._step_check: StepCheck | None = None
        self._step = "A step of the self-check"
        self._watch = StuckStepWatch(self.rank, device, envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
        # An engine within the user's own process is deleted without a call of shutdown.
        weakref.finalize(self, self._watch.close)
        if self.parallel_config.distributed_executor_backend == "mp":
            end_with_owner()

    def init_device(self) -> None:
        """As the stock worker; then the process groups of SP mode.

        Raises:
            ValueError: ``VLLM_SHIFT_DEBUG`` is neither 0 nor 1, or nodes were started with different settings.
        """
        super().init_device()
        self._check_settings()
        self.shift_config = ShiftConfig.from_dict(self.vllm_config.additional_config[CONFIG_KEY])
        # Within its pipeline stage; vLLM's TP group is all ranks of the stage.
        all_ranks = get_tp_group()
        dims = self.shift_config.dims(all_ranks.rank_in_group)
        # Where SP spans all ranks their group does, too: NCCL would take half a GiB of each GPU for another.
        sp_group = all_ranks if dims.tp == 1 else _new_group(dims.sp_groups, dims.world, "ulysses_sp")
        # With "tp" in its name a group gets vLLM's custom all-reduce. Whether these GPUs can have it is asked here, of
        # all ranks: vLLM looks at the first GPUs of the host, whichever the group has.
        name = "ulysses_tp" if why_not_direct(all_ranks) is None else "ulysses_rows"
        tp_group = _new_group(dims.tp_groups, dims.world, name) if dims.tp > 1 else None
        self.switch = ModeSwitch(dims, self.shift_config.max_tp_tokens, sp_group, tp_group)
        self._shift_groups = [] if tp_group is None else [sp_group, tp_group]
        if debug_wanted():
            self._step_check = StepCheck(get_world_group().cpu_group)

    def _check_settings(self) -> None:
        config = self.vllm_config
        check_settings(
            get_world_group().cpu_group,
            config.additional_config[CONFIG_KEY]
            | {
                "the code of vllm-shift": code_hash(),
                VARIABLE: debug_wanted(),
                "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
                "enforce_eager": config.model_config.enforce_eager,
                "cudagraph_capture_sizes": config.compilation_config.cudagraph_capture_sizes,
            },
        )

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """As the stock worker, with our layers in the model.

        Raises:
            NotImplementedError: the model has a layer that SP mode does not know.
            RuntimeError: another plugin has replaced a layer.
        """
        # The V1 and the V2 model runner call it differently.
        drafter: Any = getattr(self.model_runner, "drafter", None) or getattr(self.model_runner, "speculator", None)
        stock_load_model = self.model_runner.load_model

        def load_model(**kwargs: Any) -> None:
            with slotted_layers(self.switch):
                stock_load_model(**kwargs)
            before = torch.cuda.memory_allocated()
            self._prepare_layers()
            if current_platform.is_cuda():
                self.model_runner.model_memory_usage += torch.cuda.memory_allocated() - before

        with ExitStack() as replaced:
            if hasattr(drafter, "load_model"):
                # A draft model, loaded within slotted_layers, is built from vLLM's own layers: it runs in TP mode only.
                replaced.enter_context(_replaced(drafter, "load_model", stock_layers()(drafter.load_model)))
            # There, because the stock worker calls it within the memory that sleep mode gives back.
            replaced.enter_context(_replaced(self.model_runner, "load_model", load_model))
            super().load_model(load_dummy_weights=load_dummy_weights)
        model = self.model_runner.get_model()
        # Two ranks only, of which each makes one half while the other half travels (peers.py).
        if self.switch.dims.sp == 2:
            problem = why_not_early(model)
            self.switch.early = problem is None
            if problem is not None and self.rank == 0:
                logger.info("Shift Parallelism exchanges q, k and v before attention only: %s.", problem)
        # After the stock worker's load_model: sleep mode gives back what is allocated there, and peers know addresses.
        self.switch.attach(model, self.vllm_config)
        if self.rank == 0:
            logger.info("%s", _describe(self.shift_config, model))
            if copies := [module for module in model.modules() if getattr(module, "second_copy", 0)]:
                logger.info("%s", _describe_copies(copies))

    def _prepare_layers(self) -> None:
        model = self.model_runner.get_model()
        stop_shifting(inside_gathered(model))
        if supports_multimodal(model):
            # What encodes images and the like runs before the model's forward pass, so never in SP mode.
            stop_shifting(set(model.modules()) - set(model.get_language_model().modules()))
        check_layers(model)
        for module in model.modules():
            if isinstance(module, WholeLinear):
                module.finish()
        if self.model_config.using_transformers_backend():
            unfold(model)
        if self.vllm_config.load_config.load_format == "dummy":
            for slots in _all_slots(model):
                slots.repeat_own()
        if self.vllm_config.lora_config is not None:
            attach_adapters(model, self.switch, self.vllm_config)

    def determine_available_memory(self) -> int:
        """As the stock worker, whose profile is of the largest step: in SP mode and, where there is one, in TP mode.

        Where the model runner counts no memory for CUDA graphs, that of SP mode's graphs is added.

        Raises:
            NotImplementedError: the model takes an input that SP mode does not know.
        """
        stock_profile_run = self.model_runner.profile_run

        def profile_both_modes() -> None:
            stock_profile_run()
            # As the stock profile of each model runner: there are no KV caches yet.
            without_attention = {"skip_attn": True} if self.use_v2_model_runner else {}
            self._run_largest_step(in_sp=False, is_profile=True, **without_attention)

        with ExitStack() as replaced:
            replaced.enter_context(self._ended_if_it_fails())
            replaced.enter_context(_replaced(self.model_runner, "profile_run", profile_both_modes))
            if current_platform.is_cuda():
                counted = self.model_runner.profile_cudagraph_memory
                replaced.enter_context(
                    # The V2 model runner says 0.
                    _replaced(self.model_runner, "profile_cudagraph_memory", lambda: counted() or self._graph_memory())
                )
            available: int = super().determine_available_memory()
        return available

    def _graph_memory(self) -> int:
        sizes = self.vllm_config.compilation_config.cudagraph_capture_sizes or []
        layers = self.model_config.get_num_layers(self.parallel_config)
        # The V2 model runner captures each size once a case of LoRA: without adapters, and with some number of them.
        cases = len(getattr(self.model_runner, "lora_capture_cases", [0]))
        captures = cases * sum(map(self.switch.is_sp_step, sizes))
        return graph_memory(captures, layers, self.switch.nccl_collectives())

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """As the stock worker; then attention is told up to which step to split keys, see ``limit_splits``."""
        super().initialize_from_config(kv_cache_config)
        limit_splits(self.model_runner, self.vllm_config)

    def _run_largest_step(self, in_sp: bool, **kwargs: Any) -> None:
        """Before any other step in a mode: torch.compile chooses kernels for the size that it sees first."""
        if not self.switch.max_tp_tokens:
            return  # there is no TP mode
        most: int = self.scheduler_config.max_num_batched_tokens
        with self.switch.threshold(0 if in_sp else most):
            self.model_runner._dummy_run(most, cudagraph_runtime_mode=CUDAGraphMode.NONE, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        """As the stock worker, with TP mode compiled and the threshold found before; then the self-check.

        Raises:
            RuntimeError: the self-check failed, or had no room where it is needed.
            NotImplementedError: the self-check does not know the KV cache.
        """
        with self._ended_if_it_fails():
            return self._warm_up()

    def _warm_up(self) -> Any:
        if not self.shift_config.is_auto:  # what is measured fits, see find_threshold
            self._fit_threshold_to_graphs()
        self._run_largest_step(in_sp=False)
        if self.shift_config.is_auto:
            # The profile had no step in SP mode if none exceeds the threshold that auto begins with.
            self._run_largest_step(in_sp=True)
            self.switch.max_tp_tokens = calibrate(self.model_runner, self.switch, self.vllm_config)
        # There, and not around all of it: the stock worker runs steps once it has captured them.
        capture_model = self.switch.graph_capture()(self.model_runner.capture_model)
        with _replaced(self.model_runner, "capture_model", capture_model):
            times = super().compile_or_warm_up_model()
        self.switch.finish_saves()
        if self.shift_config.self_check:
            checked = SelfCheck(self, super().execute_model).run()
            # The V2 model runner drew seeds for its requests; later ones have to draw what they draw in stock vLLM.
            set_random_seed(self.model_config.seed)
            if checked and self.rank == 0 and self.model_config.architecture not in TESTED:
                logger.warning(
                    "Shift Parallelism: %s is not among the tested architectures; it runs by the self-check only.",
                    self.model_config.architecture,
                )
        self.shift_counter.start(self.switch.max_tp_tokens)
        return times

    def _fit_threshold_to_graphs(self) -> None:
        # With speculative decoding vLLM's model runners make CUDA graph sizes multiples of a request's tokens.
        wanted = self.switch.max_tp_tokens
        self.switch.max_tp_tokens = fit_to_graphs(wanted, padded_sizes(self.vllm_config))
        if self.switch.max_tp_tokens != wanted and self.rank == 0:
            logger.warning(
                "Shift Parallelism: steps of up to %d tokens, not %d, run in TP mode: %d is none of the CUDA graph "
                "sizes of this engine.",
                self.switch.max_tp_tokens,
                wanted,
                wanted,
            )

    def execute_model(self, scheduler_output: Any) -> Any:
        """As the stock worker; the step is counted and timed under its mode, which the log names if it fails.

        Raises:
            RuntimeError: with ``VLLM_SHIFT_DEBUG=1``, the ranks disagree on the step.
            SystemExit: the step raised, on another rank than 0 and with the executor ``mp`` or ``ray``.
        """
        max_tp_tokens = self.switch.max_tp_tokens
        if self._step_check is not None:
            self._step_check(max_tp_tokens, scheduler_output.num_scheduled_tokens.values())
        num_tokens = scheduler_output.total_num_scheduled_tokens
        if not num_tokens:
            return super().execute_model(scheduler_output)
        self._step = describe_step(num_tokens, max_tp_tokens)
        with self._reported_step(), self.shift_counter.step(self.switch.is_sp_step(num_tokens), num_tokens):
            return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As the stock worker; the sampler, and with the V2 model runner the LM head, are the second part of a step.

        Raises:
            SystemExit: as ``execute_model``.
        """
        with self._reported_step():
            return super().sample_tokens(grammar_output)

    @property
    def _end_is_noticed(self) -> bool:
        """Whether vLLM's executor notices the end of this process and ends the others."""
        # See start_worker_monitor in vllm/v1/executor/multiproc_executor.py and ray_executor_v2.py.
        return self.parallel_config.distributed_executor_backend in ("mp", "ray")

    @contextmanager
    def _reported_step(self) -> Iterator[None]:
        try:
            with self._watch.step(self._step):
                yield
        except Exception as error:
            other_rank = self.rank != 0 and self._end_is_noticed
            # vLLM logs where rank 0 was.
            logger.error("Rank %d: %s", self.rank, describe_failure(error, self._step), exc_info=other_rank)
            if other_rank:
                # The executor hears of an error from rank 0 only, which may wait for this rank in a collective.
                # Of a process it hears once that has ended, and the end of GPUs' groups may wait for other ranks.
                end_within(STEP_GRACE_CUDA if current_platform.is_cuda() else STEP_GRACE_CPU)
                raise SystemExit(1) from error
            raise

    @contextmanager
    def _ended_if_it_fails(self) -> Iterator[None]:
        """For calls at start-up, in which this rank may fail while others wait for it in a collective."""
        all_reduces = map(custom_all_reduce, (get_tp_group(), *self._shift_groups))
        try:
            with failed_captures_end_at_once([each for each in all_reduces if each is not None]):
                yield
        except Exception:
            if self._end_is_noticed:
                # vLLM logs the error, but waits for the answers of ranks before this one, or for the end of this
                # process, which may wait for others. Of one that has ended it hears at once, and ends them all.
                end_within(START_GRACE)
            raise

    def shift_stats(self) -> dict[str, int]:
        """Steps and tokens per mode, and mode changes, since start-up, for ``collective_rpc("shift_stats")``."""
        return self.shift_counter.totals()

    def reload_weights(
        self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True
    ) -> None:
        """As the stock worker, from weights in the layout of a checkpoint.

        Raises:
            NotImplementedError: the weights are sharded already; a shard fills one slot, and the others would stay old.
                Or the model is quantized: its layers no longer have slots.
        """
        if self.model_config.quantization:
            self._refuse("Shift Parallelism does not reload weights of a quantized model")
        elif not is_checkpoint_format:
            self._refuse("Shift Parallelism reloads weights in the layout of a checkpoint only")
        else:
            super().reload_weights(weights_iterator, weights_path)

    def sleep(self, level: int = 1) -> None:
        """As the stock worker.

        Raises:
            NotImplementedError: what level 2 gives up could not be loaded again.
        """
        if level == 2 and (self.model_config.quantization or self.vllm_config.lora_config is not None):
            # vLLM has stopped scheduling by now.
            self._refuse(
                "Shift Parallelism reloads neither weights of a quantized model nor adapters of LoRA: "
                "wake up, and sleep at level 1"
            )
        else:
            super().sleep(level)

    def save_sharded_state(self, *args: Any, **kwargs: Any) -> None:
        """Refused: vLLM cannot write some of the views of TP=P, and quantized layers have weights of both modes.

        Raises:
            NotImplementedError: always.
        """
        self._refuse(f"Shift Parallelism saves no weights: start stock vLLM with TP={get_tp_group().world_size}")

    save_tensorized_model = save_sharded_state

    def _refuse(self, why: str) -> None:
        """Refuse a call that all ranks refuse.

        Raises:
            NotImplementedError: on the last rank; with ``external_launcher``, where each answers for itself, on all.
        """
        # vLLM's executor reads answers in order of rank up to the first error, and would take those that are left for
        # answers to the next call (vllm/v1/executor/multiproc_executor.py).
        config = self.parallel_config
        if config.distributed_executor_backend == "external_launcher" or self.rank == config.world_size - 1:
            raise NotImplementedError(why)

    def shutdown(self) -> None:
        """As the stock worker; then our process groups, where no CUDA graph may still hold their communicators."""
        self.shift_counter.close()
        self._watch.close()
        patience = max(0, envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS - SHUTDOWN_MARGIN)
        if self._end_is_noticed and not self._watch.device_ends_within(patience):
            # The end of the model runner would wait, too, until the executor kills this process.
            logger.error("Rank %d: the device is still busy, maybe with waiting for a rank that is gone.", self.rank)
            end_within(SHUTDOWN_GRACE)
        super().shutdown()
        if current_platform.is_cpu():
            for group in self._shift_groups:
                group.destroy()


@contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """``method`` in the place of a method of ``owner``, an instance, while this is open."""
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)


def _new_group(ranks: list[list[int]], stage_size: int, name: str) -> GroupCoordinator:
    """Make groups, given for the first pipeline stage, in every stage of ``stage_size`` consecutive ranks."""
    world = get_world_group()
    backend = torch.distributed.get_backend(world.device_group)
    stages = range(0, world.world_size, stage_size)
    ranks = [[first + rank for rank in group] for first in stages for group in ranks]
    return init_model_parallel_group(ranks, world.local_rank, backend, group_name=name)


def _all_slots(model: nn.Module) -> list[Slots]:
    return [slots for module in model.modules() for slots in vars(module).values() if isinstance(slots, Slots)]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of memory behind a model's weights, each counted once however many views it has."""
    # The storage behind a parameter with slots is that of all its slots.
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _describe_copies(layers: list[Any]) -> str:
    kinds = ", ".join(sorted({type(layer.quant_method).__name__ for layer in layers}))
    return (
        f"Shift Parallelism keeps the weights of {len(layers)} quantized layers ({kinds}) twice, once for each mode, "
        f"because their format cannot be sliced: {sum(layer.second_copy for layer in layers) / 2**30:.2f} GiB more."
    )


def _describe(config: ShiftConfig, model: nn.Module) -> str:
    sp, tp = config.ulysses_sequence_parallel_size, config.tensor_parallel_size
    if config.enable_shift_parallel:
        limit = "a measured number of" if config.is_auto else config.shift_parallel_threshold
        modes = f"steps of up to {limit} tokens run in TP={config.world_size}, larger ones in SP={sp} x TP={tp}"
    else:
        modes = f"every step runs in SP={sp} x TP={tp}"
    gib = weight_bytes(model) / 2**30
    return f"Shift Parallelism on {config.world_size} ranks: {modes}; weights {gib:.2f} GiB a rank."
