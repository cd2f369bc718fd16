"""Runs vLLM's own test files on the CPU, with stock vLLM and with Shift Parallelism in every engine.

The models that the tests name are small stand-ins under the same names, so a test counts if stock vLLM passes it with
them. Takes vLLM's source distribution: ``python tests/vllm_cases.py vllm-0.26.0.tar.gz``.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import case_plugin
import tiny

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

logger = logging.getLogger("cases")

Results = dict[str, dict[str, Any]]

# Test files, and which of their tests: the others need models that have no stand-in, or a GPU, or end stock vLLM's
# engine on the CPU, and with it what comes after them (a seed with chunked prompts, which wants a CUDA generator).
FILES = {
    "basic_correctness/test_basic_correctness.py": "gc_ed or mp-True",
    "samplers/test_beam_search.py": "single_input",
    "samplers/test_logprobs.py": "",
    "v1/sample/test_sampling_params_e2e.py": "",
    "v1/sample/test_logprobs.py": "not (spec_decode or -2.0-)",
    "entrypoints/openai/completion/test_completion.py": "",
    "entrypoints/openai/chat_completion/test_chat.py": "",
    "models/language/generation/test_common.py": "True- and (gpt2 or gemma-2 or Llama or opt or Qwen2 or mixtral)",
    "v1/engine/test_llm_engine.py": "not skip_tokenizer_init",
    "v1/e2e/general/test_min_tokens.py": "",
    "v1/e2e/general/test_context_length.py": "",
    "samplers/test_ignore_eos.py": "gpt2",
    "entrypoints/llm/test_generate.py": "",
    "entrypoints/llm/test_chat.py": "",
}

# A trained model, or a random one of an architecture, by the names that the tests ask for.
STAND_INS = {
    "smollm2": (
        "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct", "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    ),
    "llama": ("hmellor/tiny-random-LlamaForCausalLM", "JackFram/llama-160m", "HuggingFaceH4/zephyr-7b-beta"),
    "gemma2": ("hmellor/tiny-random-Gemma2ForCausalLM", "google/gemma-2-2b-it"),
    "qwen2": ("Qwen/Qwen2.5-0.5B-Instruct",),
    "qwen3": ("Qwen/Qwen3-0.6B",),
    "mixtral": ("TitanML/tiny-mixtral",),
    "gpt2": ("distilbert/distilgpt2", "openai-community/gpt2"),
    "opt": ("facebook/opt-125m",),
}  # fmt: skip
ADAPTER = "typeof/zephyr-7b-beta-lora"
# Tokens of an answer to a request without a limit, which a random model would go on with up to the end of the context.
MAX_TOKENS = {"HuggingFaceH4/zephyr-7b-beta": 256}
COMMIT = "0" * 40

# The vocabulary is that of the trained model, whose tokenizer all of them have.
tiny.SHAPE.update(vocab_size=49152, max_position_embeddings=8192)


def trained_model() -> Any:
    """The first 8 layers of SmolLM2. To its 9 heads and 3 KV heads come some of zeros, for two ranks."""
    import torch
    import transformers

    import demo

    small = transformers.AutoModelForCausalLM.from_pretrained(demo.CHECKPOINT)
    shape = {"num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**small.config.to_dict() | shape)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = model.state_dict()
    more = small.state_dict()
    for name, weight in weights.items():
        weight.zero_()[tuple(slice(size) for size in more[name].shape)] = more[name]
    return model


def random_model(kind: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    more = {
        "gpt2": (transformers.GPT2Config, {"n_inner": 512}),
        "opt": (transformers.OPTConfig, {"ffn_dim": 512, "word_embed_proj_dim": 256, "init_std": 0.2}),
    }
    config_cls, extra = (tiny.CONFIGS | tiny.MORE_CONFIGS | more)[kind]
    return transformers.AutoModelForCausalLM.from_config(config_cls(**tiny.SHAPE | extra), dtype=torch.float32)


def make_stand_ins(hub: Path) -> None:
    """Write the checkpoints in the layout of the cache of models that huggingface_hub keeps."""
    import transformers
    from tokenizers.processors import TemplateProcessing

    import demo

    demo.prepare_checkpoint()
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.CHECKPOINT)
    # As those of Llama and OPT, whose tests count on it.
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    for kind, names in STAND_INS.items():
        model = trained_model() if kind == "smollm2" else random_model(kind)
        for name in names:
            model.generation_config.max_new_tokens = MAX_TOKENS.get(name)
            for saved in (model, tokenizer):
                saved.save_pretrained(snapshot(hub, name))
    tiny.make_adapter(hub, seed=0).rename(snapshot(hub, ADAPTER))


def snapshot(hub: Path, name: str) -> Path:
    """The folder of a model in the cache that huggingface_hub keeps."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "snapshots").mkdir(exist_ok=True)
    return repository / "snapshots" / COMMIT


def prepare(sdist: Path, folder: Path) -> None:
    """Put vLLM's tests without its modules, the stand-ins, and the entry point of ``case_plugin`` into a folder."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]
            # The latter has the settings of pytest.
            if member.name.startswith("tests/") or member.name == "pyproject.toml":
                archive.extract(member, folder, filter="data")
    if not (folder / "hub").exists():
        make_stand_ins(folder / "hub.partial")
        (folder / "hub.partial").rename(folder / "hub")
    info = folder / "cases-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cases\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ncases = case_plugin:register\n")


def run(tests: list[str], folder: Path, how: str, eager: bool) -> Results:
    """How some of vLLM's tests end, by their names.

    Args:
        tests: arguments of pytest.
        folder: see ``prepare``; the output is added to a log there.
        how: see ``case_plugin``.
        eager: nothing is compiled, whatever the tests say.
    """
    results, steps = folder / "results.jsonl", folder / "steps"
    results.write_text("")
    steps.write_text("")
    paths = [folder, ROOT / "tests", ROOT / "src", *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), case_plugin.RESULTS: str(results)}
    env |= {case_plugin.STEPS: str(steps), case_plugin.HOW: how}
    env |= {"HF_HUB_CACHE": str(folder / "hub"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # for tests that start `vllm serve`
    env["VLLM_CACHE_ROOT"] = str(folder / "cache")
    if eager:
        env[case_plugin.EAGER] = "1"
    else:
        del env["TORCHDYNAMO_DISABLE"]
    command = [sys.executable, "-m", "pytest", "-p", "case_plugin", "-p", "no:cacheprovider", "--timeout", "900"]
    with open(folder / f"{how}.log", "a") as log:
        subprocess.run([*command, "--rootdir", str(folder), *tests], cwd=folder, env=env, stdout=log, stderr=log)
    lines = map(json.loads, results.read_text().splitlines())
    return {line["case"]: line for line in lines}


def try_file(name: str, folder: Path, eager: bool) -> Counter[str]:
    """Write the rows of a file's tests; returns their sum, with the tests that are lost with the plugin.

    What stock vLLM passes on one rank, and fails on several, is not lost: more ranks round in another way.
    """
    stock = run([f"tests/{name}", "-k", FILES[name]], folder, case_plugin.STOCK, eager)
    passed = [case for case, result in stock.items() if result["outcome"] == "passed"]
    shift = run(passed, folder, case_plugin.SHIFT, eager) if passed else {}
    failed = [case for case in passed if case not in shift or shift[case]["outcome"] != "passed"]
    ranks = run(failed, folder, case_plugin.STOCK_TP, eager) if failed else {}
    lost = [case for case in failed if case not in ranks or ranks[case]["outcome"] != "failed"]
    rows: dict[str, Counter[str]] = {}
    for case, result in stock.items():
        ours = shift.get(case, {"outcome": "no result", "why": "", "tp": 0, "sp": 0})
        row = rows.setdefault(case.removeprefix("tests/").partition("[")[0], Counter())
        row.update(tests=1, stock=int(case in passed), shift=int(ours["outcome"] == "passed"))
        row.update(tp=ours["tp"], sp=ours["sp"])
        if case not in passed:
            logger.info("%s: %s with stock vLLM: %s", case, result["outcome"], result["why"])
        elif case in failed:
            too = "" if case in lost else "and with stock vLLM on as many ranks"
            logger.error("%s: %s with the plugin %s: %s", case, ours["outcome"], too, ours["why"])
    for case, row in rows.items():
        row_text = f"{row['stock']} of {row['tests']} | {row['shift']} | {row['tp']} / {row['sp']}"
        sys.stdout.write(f"| `{case}` | {row_text} |\n")
    sys.stdout.flush()
    return sum(rows.values(), Counter(lost=len(lost)))


def main() -> None:
    """Every file, or those named, and a table of their tests; fails if one is lost, or only one mode ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sdist", type=Path, help="vllm-0.26.0.tar.gz")
    parser.add_argument("--files", nargs="+", default=list(FILES), choices=FILES, metavar="FILE")
    parser.add_argument("--folder", type=Path, default=ROOT / ".vllm-cases", help="for stand-ins and logs; kept")
    parser.add_argument("--eager", action="store_true", help="compile nothing: several times as fast")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare(args.sdist, args.folder)
    sys.stdout.write("| case | stock passes | with the plugin | steps in TP / SP mode |\n| --- | --- | --- | --- |\n")
    sys.stdout.flush()
    total = sum((try_file(name, args.folder, args.eager) for name in args.files), Counter[str]())
    sys.exit(not (total["tp"] and total["sp"] and not total["lost"]))


if __name__ == "__main__":
    import conftest  # noqa: F401  (the environment of the CPU backend)

    main()
