"""The cost model against what was measured, what the planner makes of it, and its command line."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from planner_accuracy import points

from vllm_shift_cli import costs
from vllm_shift_cli.costs import Batch, Cluster, Layout, ModelShape
from vllm_shift_cli.errors import CommandError
from vllm_shift_cli.main import main
from vllm_shift_cli.plan import ARCHITECTURES, SHAPES, Question, make_plan, read_model

H100 = Cluster(costs.GPUS["h100"])
M8, M70 = SHAPES["8b"], SHAPES["70b"]

# How far a prediction may be from what was measured, as a factor.
WITHIN = {
    "weights": 1.001,
    "KV cache tokens": 1.02,
    "NCCL bus bandwidth": 1.06,
    "matrix products of a layer, 512 rows and more": 1.15,
    "matrix products of a layer, fewer than 512 rows": 1.35,
    "prefill, one rank, 2048 tokens and more": 1.15,
    "prefill, several GPUs, 2048 tokens and more": 1.2,
    "prefill, one rank, fewer than 2048 tokens": 1.7,
    "prefill, several GPUs, fewer than 2048 tokens": 1.3,
    "prefill, several GPUs, kernels launched one by one": 2.5,
    "step without attention": 1.25,
    "step without attention, kernels launched one by one": 1.8,
    "decode": 1.3,
}


# Against measurements


def test_every_measured_point_is_predicted():
    found = list(points())
    assert {point.group for point in found} == set(WITHIN)
    off = [point for point in found if abs(math.log(point.ratio)) > math.log(WITHIN[point.group])]
    assert not off


def test_large_matrix_products_favour_the_mode_that_was_measured_faster():
    # 8B on two ranks: at 256 rows TP mode took 0.63 of SP mode's time, at 4,096 both took the same.
    gpu = H100.gpu
    small, large = (
        costs.layer_matmul_s(M8, Layout(1, 2), n, gpu) / costs.layer_matmul_s(M8, Layout(2, 1), n, gpu)
        for n in (256, 4096)
    )
    assert small < 0.75
    assert large == pytest.approx(1, abs=0.05)


def test_order_of_crossovers():
    early = costs.crossover(M8, Layout(2, 1), 8192, H100)
    late = costs.crossover(M70, Layout(8, 1), 8192, H100)
    assert 256 <= early < 1024 < late <= 2048
    assert costs.crossover(M70, Layout(2, 4), 8192, H100) < late


# The model itself


def test_weights_are_those_of_tp_t_with_the_head_of_tp_p():
    full = costs.weight_bytes(M70, Layout(1, 1))
    table = 2 * 128256 * 8192
    assert full == 2 * (80 * (8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672)) + 2 * table
    assert costs.weight_bytes(M70, Layout(4, 2)) == (full - table) // 2 + table // 8
    # KV heads are replicated above 8 ranks: in TP=16 a rank has one, and so has each slot of an SP rank.
    more = costs.weight_bytes(M70, Layout(16, 1)) - costs.weight_bytes(M70, Layout(1, 1)) + table - table // 16
    assert more == 2 * 80 * 8192 * 2 * 8 * 128


def test_a_tied_table_counts_once():
    tied = ModelShape("tied", 64, 128, 2, 4, 4, 16, 128, tied=True)
    free = ModelShape("free", 64, 128, 2, 4, 4, 16, 128)
    assert costs.weight_bytes(free, Layout(2, 2)) - costs.weight_bytes(tied, Layout(2, 2)) == 2 * 64 * 128 // 4


def test_the_kv_cache_of_a_token_does_not_depend_on_the_mode():
    assert costs.kv_bytes_per_token(M70, 8) == 80 * 2 * 128 * 2
    assert costs.kv_bytes_per_token(M70, 64) == costs.kv_bytes_per_token(M70, 8)


def test_collectives():
    link = 450e9 * costs.ACHIEVED.link
    size = 1e9
    assert costs.all_reduce_s(size, 1, 1, H100) == costs.all_to_all_s(size, 1, H100) == 0
    assert costs.all_gather_s(size, 1, H100) == 0
    assert costs.all_reduce_s(size, 8, 1, H100) == pytest.approx(2 * 7 / 8 * size / link, rel=0.01)
    assert costs.all_gather_s(size, 8, H100) == pytest.approx(7 / 8 * size / link, rel=0.01)
    assert costs.all_to_all_s(size, 8, H100) == pytest.approx(7 / 8 * size / link, rel=0.01)
    # Two hosts of eight: half of an all-to-all crosses the network; of an all-reduce each GPU carries an eighth.
    network = 50e9 * costs.ACHIEVED.link
    across = costs.all_to_all_s(size, 16, H100)
    assert across == pytest.approx(7 / 16 * size / link + 1 / 2 * size / network, rel=0.01)
    across = costs.all_reduce_s(size, 16, 1, H100)
    assert across == pytest.approx(2 * 7 / 8 * size / link + size / 8 / network, rel=0.01)
    across = costs.all_gather_s(size, 16, H100)
    assert across == pytest.approx(7 / 8 * size / link + 1 / 2 * size / 8 / network, rel=0.01)
    # Ranks eight apart are each on a host of its own.
    assert costs.all_reduce_s(size, 2, 8, H100) == pytest.approx(size / network, rel=0.01)


def test_attention_takes_the_same_in_both_modes():
    for batch in (Batch(1, 4096), Batch(64, 1, 2048)):
        sp, tp = (costs.step_time(M70, layout, batch, H100) for layout in (Layout(4, 2), Layout(1, 8)))
        assert sp.attention == tp.attention > 0


@pytest.mark.parametrize("model", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gpu", costs.GPUS)
def test_a_step_never_gets_cheaper_with_more_tokens(model, gpu):
    for layout in costs.layouts(8):
        times = [
            costs.step_time(model, layout, Batch(1, n), Cluster(costs.GPUS[gpu])).total for n in range(1, 9000, 97)
        ]
        assert times == sorted(times)


def test_the_threshold_is_the_last_step_where_tp_mode_wins():
    layout = Layout(8, 1)
    threshold = costs.crossover(M70, layout, 8192, H100)
    assert costs.saving(M70, layout, threshold, H100) <= 0 < costs.saving(M70, layout, threshold + 16, H100)
    assert costs.crossover(M70, layout, 512, H100) is None


@pytest.mark.parametrize("most", [8192 + 16, 65536, 262144, 10**9])
def test_the_threshold_does_not_depend_on_the_largest_step(most):
    cluster = Cluster(costs.GPUS["l40s"])
    for layout in (Layout(2, 4), Layout(8, 1)):
        assert costs.crossover(M8, layout, most, cluster) == costs.crossover(M8, layout, 8192, cluster) > 0


# The same rules as the plugin, which imports vLLM


def test_the_same_limits_as_the_plugin():
    from vllm_shift import limits

    assert set(ARCHITECTURES) <= set(limits.ARCHITECTURES)
    odd = ModelShape("9 heads", 576, 1536, 2, 9, 3, 64, 49152)
    replicated = ModelShape("12 heads, 4 KV heads", 768, 3072, 2, 12, 4, 64, 12 * 64)
    for model in (*SHAPES.values(), odd, replicated):
        text = SimpleNamespace(
            num_attention_heads=model.heads, intermediate_size=model.intermediate, vocab_size=model.vocabulary
        )
        config = SimpleNamespace(hf_text_config=text, get_total_num_kv_heads=lambda model=model: model.kv_heads)
        for world in range(2, 129):
            try:
                limits.check_model_shape(config, world)
                allowed = True
            except ValueError:
                allowed = False
            assert costs.fits(model, world) == allowed, (model.name, world)


def test_an_intermediate_size_for_each_layer():
    from vllm_shift import limits

    text = SimpleNamespace(num_attention_heads=8, intermediate_size=[512, 96], vocab_size=640)
    config = SimpleNamespace(hf_text_config=text, get_total_num_kv_heads=lambda: 8)
    limits.check_model_shape(config, 2)
    text.intermediate_size = [512, 97]
    with pytest.raises(ValueError, match="intermediate size 1,"):
        limits.check_model_shape(config, 2)


# Recommendations


def test_shift_is_recommended_where_it_saves_much():
    plan = make_plan(Question(M70, 8, H100))
    assert [str(o.layout) for o in plan.options] == ["TP=8", "SP=2 x TP=4", "SP=4 x TP=2", "SP=8 x TP=1"]
    assert plan.choice.layout == Layout(2, 4)
    assert plan.reason.startswith(f"Shift pays for steps above about {plan.choice.threshold:,} tokens")
    assert "SP=4 x TP=2 would save" in plan.reason
    # With less need of KV cache a larger S is affordable; one that does not fit is never chosen.
    assert make_plan(Question(M70, 8, H100, kv_needed=100_000)).choice.layout == Layout(4, 2)
    assert plan.options[3].kv_tokens == 0
    assert set(plan.options[3].decode_ms.values()) == {None}


def test_stock_vllm_is_recommended_where_little_is_saved():
    plan = make_plan(Question(M8, 2, H100))
    assert plan.choice.layout == Layout(1, 2)
    assert plan.reason.startswith("Shift does not pay here")
    small_steps = make_plan(Question(M70, 8, H100, most=512))
    assert small_steps.choice.layout == Layout(1, 8)
    assert small_steps.reason.startswith("Shift does not pay here")
    assert "that this model can tell from nothing" in plan.reason
    slower = make_plan(Question(M70, 8, H100, most=1))
    assert slower.choice.layout == Layout(1, 8)
    assert "SP mode is not even faster" in slower.reason


def test_a_layout_that_is_worth_it_is_not_hidden_by_a_smaller_one():
    a100 = Cluster(costs.GPUS["a100"])
    plan = make_plan(Question(SHAPES["32b"], 8, a100, most=768))
    gains = {str(option.layout): option.saving for option in plan.options}
    assert gains["SP=2 x TP=4"] < 0.1 < gains["SP=4 x TP=2"]
    assert plan.choice.layout == Layout(4, 2)


def test_the_times_are_those_of_which_the_gain_is_a_share():
    small = ModelShape("small", 2048, 8192, 1, 16, 8, 128, 32000)
    plan = make_plan(Question(small, 8, H100, most=2048))
    sp, tp = (float(number) for number in re.findall(r"([\d.]+) ms in", plan.reason))
    # Both are less than the host takes.
    assert max(sp, tp) < 0.5 < plan.choice.prefill_ms[2048]
    assert 1 - sp / tp == pytest.approx(plan.choice.saving, abs=0.03)


def test_stock_vllm_is_recommended_where_sp_leaves_no_kv_cache():
    plan = make_plan(Question(M70, 2, H100))
    assert plan.choice.layout == Layout(1, 2)
    assert plan.reason.startswith("Shift does not fit here")


def test_nothing_is_recommended_where_nothing_fits():
    plan = make_plan(Question(M70, 2, Cluster(costs.GPUS["l40s"])))
    assert plan.choice is None
    assert plan.reason.startswith("Nothing fits")


def test_what_a_slow_network_costs():
    # TP groups of SP=4 x TP=4 span both hosts, with a quarter of the bytes and a quarter of the ranks on a host.
    batch = Batch(1, 8192)
    added = [
        costs.step_time(M70, layout, batch, Cluster(costs.GPUS["h100"], 8, 25)).communication
        - costs.step_time(M70, layout, batch, Cluster(costs.GPUS["h100"], 8, 50)).communication
        for layout in (Layout(1, 16), Layout(4, 4), Layout(16, 1))
    ]
    tp, mixed, sp = added
    assert mixed == pytest.approx(tp, rel=0.01)
    assert 0 < sp < 0.7 * tp


# The command line


CONFIG = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 5120, "intermediate_size": 25600,
          "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
          "vocab_size": 151936, "tie_word_embeddings": False, "dtype": "bfloat16"}  # fmt: skip


def test_a_config_is_read(tmp_path):
    path = tmp_path / "config.json"
    for windows in ({}, {"sliding_window": 4096, "use_sliding_window": False}):
        path.write_text(json.dumps(CONFIG | windows))
        for given in (tmp_path, path):
            found = read_model(str(given))
            assert found == ModelShape(tmp_path.name, *list(SHAPES["32b"].__dict__.values())[1:])


BAD_CONFIGS = {
    "does not describe architectures ..MixtralForCausalLM": {"architectures": ["MixtralForCausalLM"]},
    "does not describe architectures Llama": {"architectures": "LlamaForCausalLM"},
    "does not describe quantization": {"quantization_config": {"quant_method": "fp8"}},
    "hidden_size must be a whole number from 1 to 1,000,000, got None": {"hidden_size": None},
    "num_attention_heads must be a whole number from 1 to 1,000,000, got 0": {"num_attention_heads": 0},
    "hidden_size must be .* got 1000": {"hidden_size": 10**400},
    "does not describe sliding windows": {"sliding_window": 4096},
    "does not describe sliding windows, but": {"layer_types": ["full_attention", "sliding_attention"]},
    "dtype 'int8' is not one of": {"dtype": "int8"},
    "dtype \\['int8'\\] is not one of": {"dtype": ["int8"]},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_a_bad_config_is_refused(tmp_path, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | BAD_CONFIGS[message]))
    with pytest.raises(CommandError, match=message):
        read_model(str(tmp_path))


def test_a_quantized_checkpoint_whose_config_does_not_say_so_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CommandError, match="does not describe quantization"):
        read_model(str(tmp_path))


def test_no_config_is_refused(tmp_path):
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(CommandError, match="is not JSON: maximum recursion"):
        read_model(str(tmp_path / "deep"))
    with pytest.raises(CommandError, match=r"cannot read .*config\.json.*or one of 8b, 32b, 70b"):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("gpus", "hint"), [("3", "numbers that work"), ("1", "no layouts to choose from"), ("512", "servers of 64 GPUs")]
)
def test_numbers_of_gpus_that_do_not_divide_the_model(capsys, gpus, hint):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--model", "70b", "--gpus", gpus, "--gpu", "h100"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"--gpus {gpus}" in error
    assert hint in error
    assert "[2, 4, 8, 16, 32, 64]" in error


def test_a_model_that_nothing_divides(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_attention_heads": 7, "num_key_value_heads": 7}))
    with pytest.raises(SystemExit):
        main(["plan", "--model", str(tmp_path), "--gpus", "2", "--gpu", "h100"])
    assert "numbers that work: none" in capsys.readouterr().err


@pytest.mark.parametrize("gpus", [2, 8, 64])
@pytest.mark.parametrize("gpu", costs.GPUS)
def test_the_text_fits_120_columns_and_says_what_it_is(capsys, gpus, gpu):
    assert main(["plan", "--model", "70b", "--gpus", str(gpus), "--gpu", gpu, "--max-num-batched-tokens", "65536"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert text.startswith("PREDICTION")
    assert "Memory is that of steps of about 8,192 tokens" in text
    assert "Recommended: " in text


def test_json_has_inputs_options_and_flags(capsys):
    main(["plan", "--model", "70b", "--gpus", "8", "--gpu", "h100", "--gpu-memory-utilization", "0.8", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert "prediction" in found["what"]
    assert found["inputs"]["cluster"]["gpu"]["name"] == "H100 SXM 80GB"
    assert found["inputs"]["achieved"]["memory_share"] == 0.8
    assert [option["layout"] for option in found["options"]] == [{"sp": s, "tp": 8 // s} for s in (1, 2, 4, 8)]
    assert found["choice"] == {"sp": 2, "tp": 4}
    threshold = found["options"][1]["threshold"]
    assert found["flags"].endswith(f"--enable-shift-parallel --shift-parallel-threshold {threshold}")


def test_it_starts_without_vllm_and_torch_and_on_a_terminal_that_knows_ascii_only(tmp_path):
    folder = tmp_path / "\u6f22"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    code = (
        "import sys\nfor name in ('vllm', 'torch', 'transformers'): sys.modules[name] = None\n"
        "from vllm_shift_cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "plan", "--model", folder, "--gpus", "2", "--gpu", "a100"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    assert "Recommended" in subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def test_what_a_step_communicates():
    layout, hidden = Layout(4, 2), 75 * 8192 * 2
    # Ten tokens are three rows of each of four ranks; eight query heads of 128 a rank, and one KV head.
    assert costs.exchange_bytes(M70, layout, 10) == (12 * (1024 + 2 * 128) * 2, 12 * 1024 * 2)
    reduced = costs.all_reduce_s(hidden, 2, 4, H100)
    exchanged = sum(costs.all_to_all_s(size, 4, H100) for size in costs.exchange_bytes(M70, layout, 300))
    once = reduced + costs.all_gather_s(4 * hidden, 4, H100) + costs.all_gather_s(3 * 128256 * 2, 8, H100)
    found = costs.step_time(M70, layout, Batch(3, 100), H100).communication
    assert found == pytest.approx(80 * (2 * reduced + exchanged) + once)


def test_attention_is_bound_by_arithmetic_or_by_the_cache():
    achieved, tp8 = costs.ACHIEVED, Layout(1, 8)
    flops = 4 * 8 * 128 * 32768 * 32769 / 2
    found = costs.step_time(M70, tp8, Batch(1, 32768), H100).attention
    assert found == pytest.approx(80 * (2 * achieved.kernel_s + flops / (989e12 * achieved.attention_flops)))
    read = 64 * 8193 * 2 * 128 * 2
    found = costs.step_time(M70, tp8, Batch(64, 1, 8192), H100).attention
    assert found == pytest.approx(80 * (2 * achieved.kernel_s + read / (3350e9 * achieved.weight_bandwidth)))


def test_elementwise_work():
    # Ten tokens are three rows of each of four ranks, twelve folded.
    achieved, bandwidth = costs.ACHIEVED, 3350e9 * costs.ACHIEVED.elementwise_bandwidth

    def expected(kernels, elements):
        return pytest.approx(80 * (kernels * achieved.kernel_s + 2 * elements / bandwidth))

    def found(layout, cluster=H100):
        return costs.step_time(M70, layout, Batch(1, 10), cluster).elementwise

    a_row = 2 * (1024 + 256) + 4 * 128 + 3 * 3584
    assert found(Layout(1, 8)) == expected(5, 10 * (8 * 8192 + a_row))
    copied = 3 * 8 * 8192 + 12 * (a_row + 2 * 1024)
    assert found(Layout(4, 2)) == expected(6, copied)
    # Over NCCL, what goes out is packed, too.
    assert found(Layout(4, 2), Cluster(costs.GPUS["h100"], node_size=2)) == expected(7, copied + 12 * 2 * 1280)
