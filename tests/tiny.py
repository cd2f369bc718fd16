"""Tiny random checkpoints of each supported architecture, made with transformers."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

# Head size 32 is the least that vLLM's CPU attention takes. With P = 4 the 2 KV heads are replicated.
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 500,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Larger than the default 0.02, so that random logits are far enough apart for greedy decoding to be stable.
    "initializer_range": 0.2,
}

CONFIGS = {
    # Biases everywhere, also on the row-parallel layers.
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": False}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 48, "tie_word_embeddings": False}),
}


def make_checkpoint(name: str, folder: Path) -> Path:
    """Write a random fp32 checkpoint of the named architecture, biases and norms random, too, and a tokenizer."""
    config_cls, extra = CONFIGS[name]
    config = config_cls(**SHAPE, **extra)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    path = folder / name
    model.save_pretrained(path)
    words = {f"w{i}": i for i in range(SHAPE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(path)
    return path


def prompts() -> list[list[int]]:
    """Token ids of mixed lengths; the last two share a long prefix with the one before."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 500, (length,), generator=generator).tolist() for length in (1, 5, 33, 64, 131, 200)]
    return [*rows, [*rows[-1][:160], 7, 8, 9], [*rows[-1][:160], 11]]
