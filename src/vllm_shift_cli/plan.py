"""The subcommand ``plan``: which SP x TP for a model and some GPUs, by the cost model in ``costs.py``."""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_shift_cli import costs
from vllm_shift_cli.arguments import count, positive, share
from vllm_shift_cli.costs import GIB, Achieved, Batch, Cluster, Layout, ModelShape
from vllm_shift_cli.errors import CommandError

SHAPES = {
    "8b": ModelShape("8b (Llama-3.1-8B)", 4096, 14336, 32, 32, 8, 128, 128256),
    "32b": ModelShape("32b (Qwen3-32B)", 5120, 25600, 64, 64, 8, 128, 151936),
    "70b": ModelShape("70b (Llama-3.3-70B)", 8192, 28672, 80, 64, 8, 128, 128256),
}

# Those that the cost model describes: dense, with a gated MLP and full attention. The plugin supports more.
ARCHITECTURES = (
    "Glm4ForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)

PREFILL_TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DECODE_REQUESTS = (1, 16, 64, 256, 512, 1024)

# A smaller gain may be none: on two H100s the model predicts 7 %, and 2 % were measured.
_WORTH = 0.10
# Layouts whose gains are this close to each other are equally fast.
_EQUAL = 0.02

# Tokens of the largest steps in the measurements of memory.
_MEASURED_STEP = 8192

# More than any model's.
_MOST_SIZE = 10**6

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def add_parsers(subparsers: Any) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="predict which SP x TP suits a model and some GPUs",
        description="Predict memory, step times and the best threshold of every SP x TP for a model on some GPUs, "
        "and recommend one. Needs no GPU: it is a cost model, fitted to measurements on H100 and H200.",
    )
    parser.add_argument("--model", required=True, metavar="MODEL",
                        help=f"folder of a model or its config.json, or one of {', '.join(SHAPES)}")  # fmt: skip
    parser.add_argument("--gpus", type=count, required=True, metavar="P", help="GPUs of the server")
    parser.add_argument("--gpu", choices=costs.GPUS, required=True, help="their kind")
    parser.add_argument("--node-size", type=count, default=8, metavar="N",
                        help="GPUs of one host (default: %(default)s)")  # fmt: skip
    parser.add_argument("--network-gb-s", type=positive, default=50.0, metavar="GB/s",
                        help="between hosts, for each GPU, in one direction (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-num-batched-tokens", type=count, default=8192, metavar="N",
                        help="largest step of the server (default: %(default)s)")  # fmt: skip
    parser.add_argument("--context", type=count, default=2048, metavar="N",
                        help="tokens that a decoding request has in the KV cache (default: %(default)s)")  # fmt: skip
    parser.add_argument("--kv-tokens", type=count, metavar="N",
                        help="KV cache that the server needs (default: half of what TP alone leaves)")  # fmt: skip
    parser.add_argument("--gpu-memory-utilization", type=share, default=Achieved.memory_share, metavar="SHARE",
                        help="as of the server (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.set_defaults(run=_run)


@dataclass(frozen=True)
class Question:
    """What the planner is asked.

    Attributes:
        model: its sizes.
        world: GPUs, P.
        cluster: their kind and links.
        most: largest step, in tokens.
        context: tokens that a decoding request has in the KV cache.
        kv_needed: least tokens of KV cache; None for half of what TP alone leaves, and one step of ``most`` tokens.
        achieved: what the GPUs reach.
    """

    model: ModelShape
    world: int
    cluster: Cluster
    most: int = 8192
    context: int = 2048
    kv_needed: int | None = None
    achieved: Achieved = costs.ACHIEVED


@dataclass(frozen=True)
class Option:
    """One layout.

    Attributes:
        layout: SP x TP; SP=1 is stock vLLM, and TP mode of all the others.
        weight_gib: weights of a GPU, GiB.
        kv_tokens: tokens of KV cache.
        threshold: tokens of the largest step that is better in TP mode; None where SP mode never is.
        saving: share of TP's time on the GPUs that SP mode saves in the largest step.
        prefill_ms: by tokens of a step with one prompt.
        decode_ms: by requests; None where their KV cache does not fit.
    """

    layout: Layout
    weight_gib: float
    kv_tokens: int
    threshold: int | None
    saving: float
    prefill_ms: dict[int, float]
    decode_ms: dict[int, float | None]


@dataclass(frozen=True)
class Plan:
    """The answer: the options, TP alone first, the one that is recommended (None: no one fits), and why."""

    options: list[Option]
    choice: Option | None
    reason: str


def make_plan(question: Question) -> Plan:
    """Predict every layout and choose.

    Raises:
        CommandError: the model cannot be spread over so many GPUs.
    """
    _check_world(question.model, question.world)
    options = [_option(question, layout) for layout in costs.layouts(question.world)]
    return Plan(options, *_choose(question, options))


def _option(question: Question, layout: Layout) -> Option:
    model, most = question.model, question.most
    kv_tokens = costs.kv_tokens(model, layout, question.cluster.gpu, question.achieved)

    def milliseconds(batch: Batch) -> float:
        return 1e3 * costs.step_time(model, layout, batch, question.cluster, question.achieved).total

    prefill = sorted({n for n in PREFILL_TOKENS if n <= most} | {most})
    decode = [requests for requests in DECODE_REQUESTS if requests <= most]
    tp_s = costs.step_time(model, layout.tp_mode, Batch(1, most), question.cluster, question.achieved).gpu
    sp = layout.sp > 1
    return Option(
        layout=layout,
        weight_gib=costs.weight_bytes(model, layout) / GIB,
        kv_tokens=kv_tokens,
        threshold=costs.crossover(model, layout, most, question.cluster, question.achieved) if sp else None,
        saving=costs.saving(model, layout, most, question.cluster, question.achieved) / tp_s if sp else 0.0,
        prefill_ms={n: milliseconds(Batch(1, n)) for n in prefill},
        decode_ms={
            n: milliseconds(Batch(n, 1, question.context)) if n * (question.context + 1) <= kv_tokens else None
            for n in decode
        },
    )


def _choose(question: Question, options: list[Option]) -> tuple[Option | None, str]:
    tp, shifting = options[0], options[1:]
    least = question.kv_needed or question.most
    if tp.kv_tokens < least:
        return None, (
            f"Nothing fits: {tp.layout} leaves room for {tp.kv_tokens:,} tokens of KV cache beside {tp.weight_gib:.1f} "
            f"GiB of weights a GPU, and {least:,} are needed; take more GPUs or larger ones."
        )
    least = question.kv_needed or max(question.most, tp.kv_tokens // 2)
    fitting = [option for option in shifting if option.kv_tokens >= least]
    if not fitting:
        return tp, (
            f"Shift does not fit here: every SP x TP leaves fewer than {least:,} tokens of KV cache, {tp.layout} "
            f"leaves {tp.kv_tokens:,}; --kv-tokens sets what the server needs."
        )
    worthy = [option for option in fitting if option.saving >= _WORTH] or fitting
    best = max(option.saving for option in worthy)
    # Of equally fast layouts the one with the most KV cache.
    choice = max((o for o in worthy if o.saving >= best - _EQUAL), key=lambda o: o.kv_tokens)
    times = (
        f"a step of {question.most:,} tokens takes the GPUs {_gpu_ms(question, choice.layout)} ms in {choice.layout} "
        f"and {_gpu_ms(question, tp.layout)} ms in {tp.layout}"
    )
    lost = f"{100 * (1 - choice.kv_tokens / tp.kv_tokens):.0f} %"
    less = f"{_percent(choice.saving)} % less"
    if choice.saving < _WORTH:
        too_little = f"{less}, which is below the {100 * _WORTH:.0f} % that this model can tell from nothing"
        why = "so SP mode is not even faster there" if choice.threshold is None else too_little
        return tp, f"Shift does not pay here: {times}, {why}, and the KV cache would shrink by {lost}."
    reason = (
        f"Shift pays for steps above about {choice.threshold:,} tokens: {times}, {less}, and the KV cache shrinks by "
        f"{lost}."
    )
    fastest = max((o for o in shifting if o.kv_tokens), key=lambda o: o.saving)
    if fastest.saving > best + _EQUAL:
        reason += (
            f" {fastest.layout} would save {_percent(fastest.saving)} %, but leaves fewer than {least:,} tokens of KV "
            "cache."
        )
    return choice, reason


def _gpu_ms(question: Question, layout: Layout) -> str:
    """Time of the largest step on the GPUs alone, of which ``Option.saving`` is a share."""
    batch = Batch(1, question.most)
    milliseconds = 1e3 * costs.step_time(question.model, layout, batch, question.cluster, question.achieved).gpu
    return f"{milliseconds:,.{1 if milliseconds >= 10 else 2}f}"


def _percent(share: float) -> int:
    """Rounded towards 0: what is not worth while must not read as if it were."""
    return int(100 * share)


def _check_world(model: ModelShape, world: int) -> None:
    works = [ranks for ranks in range(2, model.heads + 1) if costs.fits(model, ranks)]
    if world == 1:
        raise CommandError(f"--gpus 1: one GPU has no layouts to choose from; numbers that work: {works or 'none'}")
    if costs.fits(model, world):
        return
    hint = f"; or run several servers of {works[-1]} GPUs" if works and world > works[-1] else ""
    raise CommandError(
        f"--gpus {world}: SP x TP = {world} ranks do not divide this model (attention heads {model.heads}, "
        f"intermediate size {model.intermediate}, padded vocabulary {model.padded_vocabulary}, KV heads "
        f"{model.kv_heads}); numbers that work: {works or 'none'}{hint}"
    )


def read_model(model: str) -> ModelShape:
    """A named shape, or the sizes in a config.json.

    Args:
        model: a name in ``SHAPES``, a folder with a config.json, or that file.

    Raises:
        CommandError: there is no such file, it lacks a size, or the cost model does not describe the model.
    """
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model)
    try:
        path = path / "config.json" if path.is_dir() else path
        config = json.loads(path.read_text())
    except OSError as error:
        raise CommandError(
            f"--model {model}: cannot read {path} ({error.strerror}); give a folder with a config.json (nothing is "
            f"downloaded), or one of {', '.join(SHAPES)}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"--model {model}: {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CommandError(f"--model {model}: {path} is not the config of a model")
    return _shape(config, path)


def _shape(config: dict[str, Any], path: Path) -> ModelShape:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or names[0] not in ARCHITECTURES:
        raise CommandError(
            f"{path}: the cost model does not describe architectures {names}; use one of {', '.join(ARCHITECTURES)}"
        )
    # Checkpoints of ModelOpt may say so in a file of their own.
    if config.get("quantization_config") or path.with_name("hf_quant_config.json").exists():
        raise CommandError(f"{path}: the cost model does not describe quantization; use an unquantized checkpoint")
    windows = config.get("sliding_window") and config.get("use_sliding_window") is not False
    if windows or "sliding" in str(config.get("layer_types")):
        raise CommandError(f"{path}: the cost model does not describe sliding windows, but full attention only")

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= _MOST_SIZE:
            raise CommandError(f"{path}: {name} must be a whole number from 1 to {_MOST_SIZE:,}, got {value!r:.60}")
        return value

    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise CommandError(f"{path}: dtype {dtype!r} is not one of {', '.join(_DTYPE_BYTES)}")
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    return ModelShape(
        name=str(path.resolve().parent.name if path.name == "config.json" else path.name),
        hidden=hidden,
        intermediate=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_size=size("head_dim", hidden // heads),
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        # vLLM serves a float32 checkpoint in half precision.
        element_bytes=min(2, _DTYPE_BYTES[dtype]),
    )


def to_json(question: Question, plan: Plan) -> dict[str, Any]:
    """The plan with all its inputs, as JSON takes it."""

    def option_json(option: Option) -> dict[str, Any]:
        return asdict(option) | {"layout": {"sp": option.layout.sp, "tp": option.layout.tp}}

    return {
        "what": "a prediction of a cost model, not a measurement",
        "inputs": asdict(question),
        "options": [option_json(option) for option in plan.options],
        "choice": None if plan.choice is None else {"sp": plan.choice.layout.sp, "tp": plan.choice.layout.tp},
        "flags": flags(plan.choice),
        "reason": plan.reason,
    }


def flags(choice: Option | None) -> str | None:
    """What to give to vLLM for a layout."""
    if choice is None:
        return None
    text = f"--tensor-parallel-size {choice.layout.tp}"
    if choice.layout.sp > 1:
        text += f" --ulysses-sequence-parallel-size {choice.layout.sp} --enable-shift-parallel"
        text += f" --shift-parallel-threshold {choice.threshold}"
    return text


def to_text(question: Question, plan: Plan) -> str:
    """The plan for a reader, at most 120 columns wide."""
    tp, model, cluster = plan.options[0], question.model, question.cluster
    hosts = -(-question.world // cluster.node_size)
    link = f"{cluster.gpu.link_gb_s:g} GB/s {'NVLink' if cluster.gpu.nvlink else 'PCIe'}"
    network = f", {hosts} hosts of {cluster.node_size}, {cluster.network_gb_s:g} GB/s a GPU between them" * (hosts > 1)
    needed = (
        f"{question.kv_needed:,} tokens" if question.kv_needed else f"half of the tokens that {tp.layout} has room for"
    )
    lines = [
        "PREDICTION of a cost model fitted to measurements on H100 and H200; not a measurement of your machine.",
        "",
        f"Model   {model.name}: {model.layers} layers, hidden {model.hidden}, MLP {model.intermediate}, "
        f"{model.heads} heads, {model.kv_heads} KV heads, vocabulary {model.vocabulary}",
        f"GPUs    {question.world} x {cluster.gpu.name}, {link}{network}",
        f"        {cluster.gpu.tflops:g} TFLOP/s dense bf16, {cluster.gpu.hbm_gb_s:g} GB/s memory, "
        f"{cluster.gpu.memory_gib:g} GiB of which vLLM takes {100 * question.achieved.memory_share:.0f} %",
        f"Server  steps of up to {question.most:,} tokens, KV cache for at least {needed}",
        *[f"        Memory is that of steps of about {_MEASURED_STEP:,} tokens; larger ones leave less KV cache."]
        * (question.most > _MEASURED_STEP),
        "",
        *_table(
            ["", "weights, GiB a GPU", "KV cache, tokens", "threshold", f"gain at {question.most:,} tokens"],
            [[str(o.layout), f"{o.weight_gib:.1f}", f"{o.kv_tokens:,}" if o.kv_tokens else "does not fit",
              *(_threshold_cells(o) if o is not tp else ["stock vLLM", ""])] for o in plan.options],
        ),
        "",
        "Prefill: ms for a step of one prompt with so many tokens. TP mode of every row is the first row.",
        *_times({str(option.layout): option.prefill_ms for option in plan.options}),
        "",
        f"Decode: ms for a step of so many requests, {question.context:,} tokens of context each; - where the KV cache "
        "is too small.",
        *_times({str(option.layout): option.decode_ms for option in plan.options}),
        "",
    ]  # fmt: skip
    name = str(plan.choice.layout) if plan.choice else "none"
    lines += [f"Recommended: {name}. {plan.reason}"]
    if plan.choice:
        lines += ["Flags:", f"  {flags(plan.choice)}"]
    if costs.kv_tokens(model, Layout(1, 1), cluster.gpu, question.achieved) >= (question.kv_needed or question.most):
        lines += [f"The model fits one GPU: {question.world} servers of one GPU each may give more throughput."]
    return "\n".join(_wrapped(line) for line in lines)


def _threshold_cells(option: Option) -> list[str]:
    threshold = "never faster" if option.threshold is None else f"{option.threshold:,}"
    return [threshold, f"{_percent(option.saving):+} %"]


def _times(times: dict[str, dict[int, Any]]) -> list[str]:
    counts = list(next(iter(times.values())))
    rows = [[name, *("-" if ms[n] is None else f"{ms[n]:.1f}" for n in counts)] for name, ms in times.items()]
    return _table(["", *(f"{n:,}" for n in counts)], rows)


def _table(header: list[str], rows: Sequence[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return [line(row) for row in [header, *rows]]


def _wrapped(line: str) -> str:
    return line if len(line) <= 120 else textwrap.fill(line, 120, break_on_hyphens=False, subsequent_indent="    ")


def _run(args: argparse.Namespace) -> int:
    gpu = costs.GPUS[args.gpu]
    question = Question(
        model=read_model(args.model),
        world=args.gpus,
        cluster=Cluster(gpu, args.node_size, args.network_gb_s),
        most=args.max_num_batched_tokens,
        context=args.context,
        kv_needed=args.kv_tokens,
        achieved=replace(costs.ACHIEVED, memory_share=args.gpu_memory_utilization),
    )
    plan = make_plan(question)
    sys.stdout.write((json.dumps(to_json(question, plan), indent=2) if args.json else to_text(question, plan)) + "\n")
    return 0
