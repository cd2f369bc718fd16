"""Tiny random checkpoints of each supported architecture, made with transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL.Image import Image, fromarray
from safetensors.torch import load_file, save_file
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

# Of these, one layout and two thresholds run with `make test`; the other layouts with `make test-nightly`.
LAYER_TYPES = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
MORE_CONFIGS = {
    "llama3": (transformers.LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "gemma2": (transformers.Gemma2Config, {"query_pre_attn_scalar": 32, "sliding_window": 48}),
    "gemma3": (transformers.Gemma3TextConfig, {"query_pre_attn_scalar": 32, **LAYER_TYPES}),
    "phi3": (transformers.Phi3Config, {"tie_word_embeddings": False, "pad_token_id": 0}),
    "granite": (
        transformers.GraniteConfig,
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
    "glm4": (transformers.Glm4Config, {"partial_rotary_factor": 0.5, "tie_word_embeddings": False, "pad_token_id": 0}),
    "olmo2": (transformers.Olmo2Config, {"pad_token_id": 0, "num_key_value_heads": 4}),
    "olmo3": (transformers.Olmo3Config, {"pad_token_id": 0, "num_key_value_heads": 4, **LAYER_TYPES}),
    "cohere": (transformers.CohereConfig, {"logit_scale": 1.0, "pad_token_id": 0}),
    # A norm with weights for each head, as of Command R+.
    "cohere-plus": (
        transformers.CohereConfig,
        {"use_qk_norm": True, "num_key_value_heads": 4, "logit_scale": 1.0, "pad_token_id": 0},
    ),
    "mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
    ),
    "llama4": (
        transformers.Llama4TextConfig,
        {
            "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 256, "intermediate_size_mlp": 192,
            "attention_chunk_size": 64, "interleave_moe_layer_step": 2, "pad_token_id": 0, "no_rope_layers": [1, 0, 1],
        },
    ),
}  # fmt: skip


def make_checkpoint(name: str, folder: Path, seed: int = 0, **sizes: Any) -> Path:
    """Write a random fp32 checkpoint of the named architecture, biases and norms random, too, and a tokenizer.

    Fields of its config that ``sizes`` has are other ones.
    """
    config_cls, extra = (CONFIGS | MORE_CONFIGS)[name]
    config = config_cls(**(SHAPE | extra | sizes))
    model = _random_model(transformers.AutoModelForCausalLM, config, seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    path = folder / name
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def sharpen(source: Path, folder: Path) -> None:
    """Copy a checkpoint with norms of queries and keys, attention so sharp that rounding grows in each layer."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] *= 5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _random_model(auto_cls: Any, config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = auto_cls.from_config(config, dtype=torch.float32)
    if config.model_type.startswith("gemma"):
        # Its embeddings are scaled up and tied to the head: the last token would always come next.
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.1)
    return model


def _tokenizer(*special: str, **named: str) -> transformers.PreTrainedTokenizerFast:
    words = [*(f"w{i}" for i in range(SHAPE["vocab_size"])), *special]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w2", extra_special_tokens=named or None
    )


# Stands for a part of an image; then come those of a video, of the start and of the end of either.
IMAGE_TOKEN = SHAPE["vocab_size"]


def make_vision_checkpoint(folder: Path) -> Path:
    """Write a random fp32 checkpoint of Qwen2.5-VL, which takes images, and its processor."""
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "fullatt_block_indexes": [1],
        "window_size": 56, "out_hidden_size": SHAPE["hidden_size"],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=SHAPE | {"vocab_size": 512, "tie_word_embeddings": False, "rope_parameters": M_ROPE},
        vision_config=vision,
        tie_word_embeddings=False,
        **{name: IMAGE_TOKEN + i for i, name in enumerate(ids)},
    )
    path = folder / "qwen2_5_vl"
    _random_model(transformers.AutoModelForImageTextToText, config, seed=0).save_pretrained(path)
    transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=16 * 28 * 28),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        tokenizer=_tokenizer(*special, image_token=special[0], video_token=special[1]),
    ).save_pretrained(path)
    return path


VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip

# Of models that take images, what differs from SHAPE and from VISION; they run with their language model alone.
TEXT_ONLY_CONFIGS = {
    "gemma3": (transformers.Gemma3Config, MORE_CONFIGS["gemma3"][1], {}),
    "llama4": (
        transformers.Llama4Config,
        MORE_CONFIGS["llama4"][1],
        {
            "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "pixel_shuffle_ratio": 0.5,
        },
    ),
    "qwen3_vl": (
        transformers.Qwen3VLConfig,
        {"tie_word_embeddings": False, "rope_parameters": M_ROPE},
        {
            "depth": 2, "num_heads": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            "out_hidden_size": SHAPE["hidden_size"],
        },
    ),
}  # fmt: skip


def make_text_only_checkpoint(name: str, folder: Path) -> Path:
    """Write a random fp32 checkpoint of a model that takes images, without what it needs for them, and a tokenizer."""
    config_cls, text, vision = TEXT_ONLY_CONFIGS[name]
    config = config_cls(text_config=SHAPE | text, vision_config=VISION | vision)
    path = folder / f"{name}-vision"
    _random_model(transformers.AutoModelForImageTextToText, config, seed=0).save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def image(number: int) -> Image:
    """A picture of noise, 84 x 84."""
    generator = torch.Generator().manual_seed(number)
    return fromarray(torch.randint(0, 256, (84, 84, 3), generator=generator, dtype=torch.uint8).numpy())


def make_adapters(folder: Path, **options: Any) -> list[Path]:
    """Write four adapters. The last two leave out what the first two have, and take their places in turn."""
    kinds: list[dict[str, Any]] = [{}, {}, *[{"only": ("q_proj", "v_proj"), "embedding": False}] * 2]
    return [make_adapter(folder, seed, **options | kind) for seed, kind in enumerate(kinds)]


def make_adapter(
    folder: Path,
    seed: int,
    kv_heads: int = SHAPE["num_key_value_heads"],
    embedding: bool = True,
    only: tuple[str, ...] = (),
) -> Path:
    """Write a random LoRA adapter in the layout of peft, for every linear layer or those named, and the embedding."""
    generator = torch.Generator().manual_seed(seed)
    hidden, q_size = SHAPE["hidden_size"], SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    kv_size, inner = kv_heads * SHAPE["head_dim"], SHAPE["intermediate_size"]
    shapes = {
        "self_attn.q_proj": (q_size, hidden), "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden), "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    if only:
        shapes = {name: shape for name, shape in shapes.items() if name.endswith(only)}
    rank = 8
    weights = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for name, (outputs, inputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.1
            weights[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.1
    modules = [name.split(".")[1] for name in shapes]
    if embedding:
        modules.append("embed_tokens")
        prefix = "base_model.model.model.embed_tokens"
        weights[f"{prefix}.lora_embedding_A"] = torch.randn(rank, SHAPE["vocab_size"], generator=generator) * 0.1
        weights[f"{prefix}.lora_embedding_B"] = torch.randn(hidden, rank, generator=generator) * 0.1
    path = folder / f"adapter-{seed}"
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def merge_adapter(model: torch.nn.Module, path: Path) -> None:
    """Add what such an adapter stands for to the weights of a model."""
    weights = load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    scale, parameters = config["lora_alpha"] / config["r"], dict(model.named_parameters())
    with torch.no_grad():
        for name, a in weights.items():
            if name.endswith("lora_A.weight"):
                change = weights[name.replace("lora_A", "lora_B")] @ a
            elif name.endswith("lora_embedding_A"):
                change = (weights[name.removesuffix("A") + "B"] @ a).T
            else:
                continue
            parameters[f"{name.removeprefix('base_model.model.').split('.lora')[0]}.weight"].add_(scale * change)


def prompts() -> list[list[int]]:
    """Token ids of mixed lengths; the last two share a long prefix with the one before."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 500, (length,), generator=generator).tolist() for length in (1, 5, 33, 64, 131, 200)]
    return [*rows, [*rows[-1][:160], 7, 8, 9], [*rows[-1][:160], 11]]


def make_drafter(method: str, folder: Path) -> Path:
    """Write a random draft model of one layer for these targets, in the layout of "eagle" or "eagle3"."""
    config = transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": 1}, tie_word_embeddings=False)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name.removeprefix("model."): weight for name, weight in model.state_dict().items()}
    hidden = SHAPE["hidden_size"]
    if method == "eagle":
        # It has no norms at either end, and predicts with the target's embedding and head.
        for name in ("layers.0.input_layernorm.weight", "norm.weight", "lm_head.weight", "embed_tokens.weight"):
            del weights[name]
        weights["fc.weight"] = torch.randn(hidden, 2 * hidden) * 0.05
        config.architectures = ["LlamaForCausalLM"]
    else:
        # Its only layer takes an embedding next to a hidden state, made from those of three layers of the target.
        weights = {name.replace("layers.0.", "midlayer."): weight for name, weight in weights.items()}
        del weights["embed_tokens.weight"]
        for name in ("q", "k", "v"):
            weight = weights[f"midlayer.self_attn.{name}_proj.weight"]
            weights[f"midlayer.self_attn.{name}_proj.weight"] = torch.cat([weight, weight], dim=1)
        weights["midlayer.hidden_norm.weight"] = torch.ones(hidden)
        weights["fc.weight"] = torch.randn(hidden, 3 * hidden) * 0.05
        config.architectures = ["LlamaForCausalLMEagle3"]
        config.draft_vocab_size = SHAPE["vocab_size"]
    path = folder / method
    config.save_pretrained(path)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path / "model.safetensors")
    return path
