"""The engines that the benchmarks compare, and the model shapes they run."""

import argparse
import json
from pathlib import Path
from typing import Any

SHAPES = {
    # head size 64 is the least that FlashAttention 3 and the CPU backend share
    "tiny": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1024},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "32b": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
}  # fmt: skip


def write_config(sizes: dict[str, int], folder: Path, tokenizer: bool = False) -> Path:
    """Write the config of a Llama of these sizes, without weights, maybe a tokenizer; returns its folder."""
    from transformers import LlamaConfig

    path = folder / "model"
    config = LlamaConfig(**sizes, max_position_embeddings=65536, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(path)
    if tokenizer:
        _write_tokenizer(sizes["vocab_size"], path)
    return path


def _write_tokenizer(words: int, path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(path)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that choose an engine: ``--tp``, ``--sp``, ``--threshold``, ``--engine-args``."""
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--sp", type=int, default=1, help="Ulysses sequence parallel size; 1 is stock vLLM")
    parser.add_argument(
        "--threshold",
        type=lambda text: text if text == "auto" else int(text),
        default=None,
        help="shift at this threshold, a number or 'auto'; left out: plain Ulysses",
    )
    parser.add_argument("--engine-args", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")


def engine_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM`` for those flags."""
    kwargs: dict[str, Any] = {"tensor_parallel_size": args.tp, "skip_tokenizer_init": True, "seed": 0}
    if args.sp > 1:
        kwargs["ulysses_sequence_parallel_size"] = args.sp
        if args.threshold is not None:
            kwargs |= {"enable_shift_parallel": True, "shift_parallel_threshold": args.threshold}
    return kwargs | args.engine_args
