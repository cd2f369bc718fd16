"""vLLM's features and further models in both modes on CUDA, against stock vLLM with TP over all ranks.

Asks what ``tests/test_features.py`` asks, in fp32 by default. The ranks share the first GPU (shared_gpu.py), or have
one each with --own-gpus, with compiled code and CUDA graphs unless --eager is given. Prints one line a feature, on
tokens, log-probabilities and KV caches. Examples: python benchmarks/features.py ngram eagle
                  python benchmarks/features.py tokens --model deepseek --dtype bfloat16 --own-gpus --sp 2 --tp 2
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import feature_main
import shared_gpu
import test_features
import tiny
import transformers
from quantize import quantize_experts

GPT_OSS = {
    "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256, "pad_token_id": 0,
    **tiny.LAYER_TYPES,
}  # fmt: skip

# Architectures that vLLM's CPU backend cannot run.
CUDA_MODELS = {
    # Multi-head latent attention.
    "deepseek": (
        transformers.DeepseekV2Config,
        {
            "num_key_value_heads": 8, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "head_dim": 64,
            "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 8, "n_shared_experts": 1,
            "num_experts_per_tok": 2, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
            "n_group": 1, "topk_group": 1, "topk_method": "greedy",
        },
    ),
    # Attention sinks.
    "gpt_oss": (transformers.GptOssConfig, GPT_OSS),
    # Experts in MXFP4, which is for bfloat16 only; smaller weights, so that rounding grows less from layer to layer.
    # Kernels pad these sizes, as those of published ones: 352 / P to a multiple of 64, 320 to one of 256 (Marlin).
    "gpt_oss_mxfp4": (
        transformers.GptOssConfig,
        GPT_OSS | {"hidden_size": 320, "intermediate_size": 352, "initializer_range": 0.05},
    ),
    # Mamba layers beside attention.
    "granite_hybrid": (
        transformers.GraniteMoeHybridConfig,
        {
            "layer_types": ["mamba", "attention", "mamba"], "num_attention_heads": 4, "head_dim": 64,
            "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128,
            "shared_intermediate_size": 192, "mamba_n_heads": 16,
            "mamba_d_head": 32, "mamba_d_state": 64, "mamba_n_groups": 2, "pad_token_id": 0,
            "position_embedding_type": "rope",
        },
    ),
    # Mamba and attention in the same layer.
    "falcon_h1": (
        transformers.FalconH1Config,
        {
            "num_attention_heads": 4, "head_dim": 64, "mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_ssm": 512,
            "mamba_d_state": 64, "mamba_n_groups": 2, "pad_token_id": 0,
        },
    ),
}  # fmt: skip


def job_of(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The job of ``feature_main``, for this GPU."""
    path = tiny.make_checkpoint(args.model, folder)
    if args.model == "gpt_oss_mxfp4":
        quantize_experts(path, folder / "mxfp4")
        path = folder / "mxfp4"
    model = str(path)
    features: dict[str, Any] = {"tokens": {"ask": "tokens", "args": {}}}
    if args.names != ["tokens"]:
        features |= test_features.features(model, folder)
        features["eagle3"] = test_features.speculative(method="eagle3", model=str(tiny.make_drafter("eagle3", folder)))
        features["sleep"] = {"ask": "sleeps", "args": {}, "ours": {"enable_sleep_mode": True}}
        experts = {"model": str(tiny.make_checkpoint("mixtral", folder)), "enable_expert_parallel": True}
        features["expert parallelism"] = {"ask": "tokens", "args": experts}
    common = test_features.common(model) | shared_gpu.engine_args(args.own_gpus)
    common |= {"enforce_eager": args.eager, "dtype": args.dtype}
    del common["block_size"]
    if args.dtype == "float32":
        # Of the attention kernels for CUDA, these take fp32.
        common["attention_config"] = {"backend": "TRITON_ATTN"}
    return {
        "folder": str(folder), "checkpoints": [model, str(tiny.make_checkpoint("llama", folder / "other", seed=1))],
        "sp": args.sp, "tp": args.tp, "start_threshold": args.threshold, "thresholds": [args.threshold],
        "common": common, "adapters": [str(path) for path in tiny.make_adapters(folder)],
        "prompts": test_features.prompts(), "features": [{"name": name} | features[name] for name in args.names],
    }  # fmt: skip


def compare(stock: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """How our runs differ from those of stock vLLM; of other tokens, how far the first of them are apart."""
    found: dict[str, Any] = {"outputs": 0, "other_tokens": 0, "largest_difference": 0.0, "preferred_by": []}
    for their_run, our_run in zip(stock, ours, strict=True):
        for theirs, our in zip(their_run["outputs"], our_run["outputs"], strict=True):
            found["outputs"] += 1
            if theirs["tokens"] != our["tokens"]:
                found["other_tokens"] += 1
                pairs = zip(theirs["tokens"], our["tokens"], theirs["numbers"], our["numbers"], strict=True)
                found["preferred_by"].append(next(abs(a - b) for one, other, a, b in pairs if one != other))
                continue
            pairs = zip(theirs["numbers"], our["numbers"], strict=True)
            found["largest_difference"] = max([found["largest_difference"], *(abs(a - b) for a, b in pairs)])
    found["kv_difference"] = max(run["kv_difference"] for run in ours)
    found["counts"] = [[run["counts"] for run in runs] for runs in (stock, ours)]
    found["steps"] = [run["stats"] for run in ours]
    found["self_check"] = [line for line in ours[0]["lines"] if "self-check" in line]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="+", metavar="feature",
        help="tokens, eagle3, sleep, 'expert parallelism', or one of tests/test_features.py, such as 'KV connector'",
    )  # fmt: skip
    tiny.MORE_CONFIGS.update(CUDA_MODELS)
    parser.add_argument("--model", default="llama", choices=tiny.CONFIGS | tiny.MORE_CONFIGS)
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    # The threshold cannot change between runs: CUDA graphs were captured with it.
    parser.add_argument("--threshold", type=int, default=48, help="0 is SP mode always; 48, for prefills only")
    parser.add_argument("--eager", action="store_true", help="without compiled code and CUDA graphs")
    parser.add_argument("--own-gpus", action="store_true", help="a GPU for each rank, with NCCL")
    args = parser.parse_args()
    if not shared_gpu.is_rank():
        sys.exit(shared_gpu.run_ranks(args.sp * args.tp, args.own_gpus))
    with tempfile.TemporaryDirectory() as folder:
        results = feature_main.try_features(job_of(args, Path(folder)))
    row = vars(args) | {"v2_runner": os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "default")}
    for name, runs in results.items():
        print("RESULT", json.dumps(row | {"names": name} | compare(**runs)), flush=True)


if __name__ == "__main__":
    main()
