"""The flags, and what they become: configs of stock engines, or clear refusals. No engine starts here."""

import copy
import dataclasses
import itertools
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import tiny
import vllm
from rank_group import CASES, Group
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.model_executor import custom_op
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_shift
from vllm_shift import limits, plugin, translate
from vllm_shift.config import CONFIG_KEY, ShiftConfig
from vllm_shift.exit_code import ExitCode
from vllm_shift.graphs import fit_to_graphs, graph_sizes, set_graph_sizes
from vllm_shift.translate import _check_draft

README = (Path(__file__).parents[1] / "README.md").read_text()


# CUDA graph sizes of vLLM.
STOCK_SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny.make_checkpoint("llama", tmp_path_factory.mktemp("plugin")))


def create(model, args_cls=EngineArgs, **kwargs):
    defaults = {"enforce_eager": True, "max_model_len": 128, "dtype": "float32"}
    return args_cls(model=model, **(defaults | kwargs)).create_engine_config()


SHIFT = {"ulysses_sequence_parallel_size": 2, "enable_shift_parallel": True}


@pytest.mark.parametrize("args_cls", [EngineArgs, AsyncEngineArgs])
def test_flags_reach_the_fields(args_cls, llama):
    parser = args_cls.add_cli_args(FlexibleArgumentParser())
    flags = "--ulysses-sequence-parallel-size 2 --enable-shift-parallel --shift-parallel-threshold 77"
    args = args_cls.from_cli_args(parser.parse_args(["--model", llama, *flags.split()]))
    assert args.ulysses_sequence_parallel_size == 2
    assert args.enable_shift_parallel is True
    assert args.shift_parallel_threshold == 77
    defaults = args_cls.from_cli_args(parser.parse_args(["--model", llama]))
    assert (defaults.ulysses_sequence_parallel_size, defaults.enable_shift_parallel) == (1, False)
    assert defaults.shift_parallel_threshold == 256
    # As one given later on a command line than those of a config file.
    assert not parser.parse_args(["--enable-shift-parallel", "--no-enable-shift-parallel"]).enable_shift_parallel


@pytest.mark.parametrize("args_cls", [EngineArgs, AsyncEngineArgs])
def test_flags_survive_a_process_that_reads_them_before_it_loads_plugins(args_cls, llama):
    parser = args_cls.add_cli_args(FlexibleArgumentParser())
    flags = ["--model", llama, "--ulysses-sequence-parallel-size", "2", "--enable-shift-parallel"]
    for more in ([], ["--additional-config", '{"other": 1, "shift_parallel": {"self_check": false}}']):
        args = parser.parse_args(flags + more)
        parent = args_cls.from_cli_args(args)
        child = args_cls(model=llama, additional_config=args.additional_config)
        settings = [translate.read_settings(each) for each in (parent, child)]
        assert settings[0] == settings[1]
        assert settings[0].active
        assert settings[0].self_check == (not more)
    args = parser.parse_args(["--model", llama])
    args_cls.from_cli_args(args)
    assert args.additional_config == {}
    # Whatever it is, the complaint about it is vLLM's own, or that of read_settings.
    args_cls.from_cli_args(parser.parse_args(["--model", llama, "--additional-config", "[1]"]))
    wrong = ["--additional-config", '{"shift_parallel": {"ulysses_sequence_parallel_size": 4}}']
    with pytest.raises(ValueError, match=r"4 in additional.*give it once"):
        translate.read_settings(args_cls.from_cli_args(parser.parse_args(flags + wrong)))


UNPICKLE = """
import pickle, sys
engine_args = [pickle.loads(bytes.fromhex(each)) for each in sys.argv[1:]]
again = [type(each)(**vars(each)) for each in engine_args]
print("vllm_shift" in sys.modules, *(getattr(each, "ulysses_sequence_parallel_size", 0) for each in again))
"""


@pytest.mark.parametrize(
    ("settings", "printed"),
    [({}, "False 0"), (SHIFT, "True 2"), ({"additional_config": {CONFIG_KEY: SHIFT}}, "True 1")],
    ids=["stock", "fields", "config"],
)
def test_engine_args_sent_to_a_process_bring_the_plugin_if_they_need_it(llama, settings, printed):
    """As ``vllm bench startup`` sends them: it unpickles them, and makes new ones, before it loads plugins."""
    sent = pickle.dumps(AsyncEngineArgs(model=llama, **settings)).hex()
    environment = os.environ | {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    run = subprocess.run([sys.executable, "-c", UNPICKLE, sent], env=environment, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == [printed], run.stderr


def test_copies_of_engine_args_keep_the_settings(llama):
    for settings in ({}, SHIFT):
        engine_args = EngineArgs(model=llama, **settings)
        for copied in (copy.copy(engine_args), copy.deepcopy(engine_args)):
            assert type(copied) is EngineArgs
            assert vars(copied) == vars(engine_args)
            assert vars(copied) is not vars(engine_args)

    class WithoutItsLock(EngineArgs):
        lock = None

        def __getstate__(self):
            return {name: value for name, value in vars(self).items() if name != "lock"}

    engine_args = WithoutItsLock(model=llama, **SHIFT)
    engine_args.lock = threading.Lock()
    assert copy.deepcopy(engine_args).lock is None
    assert dataclasses.replace(engine_args, seed=5).enable_shift_parallel


def test_api_servers_gain_the_exit_code(llama, monkeypatch):
    parser = make_arg_parser(FlexibleArgumentParser())
    model = ["--model", llama]
    flags = [*model, "--ulysses-sequence-parallel-size", "2"]
    settings = [*model, "--additional-config", '{"shift_parallel": {"ulysses_sequence_parallel_size": 2}}']
    name = "vllm_shift.exit_code.ExitCode"

    def middleware(words):
        args = parser.parse_args(words)
        AsyncEngineArgs.from_cli_args(args)
        AsyncEngineArgs.from_cli_args(args)  # as the parent of several API servers and each of these do
        return args.middleware

    assert resolve_name(name) is ExitCode
    for words in (flags, settings):
        assert middleware(words) == [name]
        assert middleware([*words, "--middleware", "my.own"]) == ["my.own", name]
    off = [*model, "--additional-config", '{"shift_parallel": {"self_check": false}}']
    for words in (model, off):
        assert middleware(words) == []
    engine_only = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags)
    EngineArgs.from_cli_args(engine_only)
    assert not hasattr(engine_only, "middleware")
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert middleware(flags) == []


@pytest.mark.parametrize("name", ["draft_tensor_parallel_size", "draft-tensor-parallel-size"])
@pytest.mark.parametrize("degree", [1, 2, 8])
def test_a_draft_model_has_no_degree_of_its_own(llama, degree, name):
    layout = {"tensor_parallel_size": 2, "ulysses_sequence_parallel_size": 2}
    draft = {"method": "draft_model", "model": llama, "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match=f"draft_tensor_parallel_size is {degree}, .* set it to 4, or leave it out"):
        create(llama, **layout, speculative_config=draft | {name: degree})
    create(llama, **layout, speculative_config=draft | {name: 4})
    create(llama, **layout, speculative_config=draft)


def test_a_draft_head_may_run_on_one_rank():
    for degree in (1, 4, None):
        head = {"method": "eagle", "draft_tensor_parallel_size": degree}
        _check_draft(4, SimpleNamespace(speculative_config=head))
    with pytest.raises(ValueError, match="set it to 4"):
        _check_draft(4, SimpleNamespace(speculative_config=head | {"draft_tensor_parallel_size": 2}))


def test_servers_that_would_lose_the_flags_are_refused(llama, capsys):
    parser = make_arg_parser(FlexibleArgumentParser())
    flags = ["--ulysses-sequence-parallel-size", "2"]
    ports = ["--data-parallel-multi-port-external-lb"]
    for words in (flags + ports, ports + flags):
        with pytest.raises(SystemExit):
            parser.parse_args(["--model", llama, *words])
        assert "not allowed with argument" in capsys.readouterr().err
    for words in (flags, ports):
        parser.parse_args(["--model", llama, *words])


def test_help_shows_the_flags_in_a_group_of_their_own():
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    (group,) = [group for group in parser._action_groups if group.title == "ShiftParallelConfig"]
    shown = [option for action in group._group_actions for option in action.option_strings]
    for flag in ("--ulysses-sequence-parallel-size", "--enable-shift-parallel", "--shift-parallel-threshold"):
        assert flag in shown
        assert flag in README


def test_registering_twice_changes_nothing():
    before = EngineArgs.__init__, EngineArgs.add_cli_args, EngineArgs.create_engine_config
    plugin.register()
    assert before == (EngineArgs.__init__, EngineArgs.add_cli_args, EngineArgs.create_engine_config)


def test_another_vllm_version_is_left_alone(monkeypatch, caplog_vllm):
    monkeypatch.setattr(vllm, "__version__", "0.27.1")
    monkeypatch.setattr(plugin, "_add_fields", lambda cls: pytest.fail("applied a change"))
    monkeypatch.delattr(EngineArgs, "_vllm_shift")
    plugin.register()
    assert caplog_vllm.messages == [
        "vllm-shift works with vLLM 0.26.0, found 0.27.1: Shift Parallelism is not available."
    ]


def test_without_the_flags_the_config_is_stock(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_shift.translate", None)  # its import would fail
    config = create(llama, tensor_parallel_size=2)
    assert config.parallel_config.tensor_parallel_size == 2
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.additional_config == {}
    assert not custom_op.op_registry_oot


class OtherPluginsConfig:
    """vLLM takes any object with this method as additional_config."""

    def compute_hash(self):
        return "other"


def test_another_plugins_object_as_additional_config(llama):
    other = OtherPluginsConfig()
    assert create(llama, additional_config=other).additional_config is other
    with pytest.raises(ValueError, match=r"needs an additional_config that is a dict, got .*OtherPluginsConfig"):
        create(llama, additional_config=other, **SHIFT)


def test_the_flags_become_a_stock_config_of_all_ranks(llama):
    args = EngineArgs(model=llama, tensor_parallel_size=2, shift_parallel_threshold=99, enforce_eager=True, **SHIFT)
    config = args.create_engine_config()
    assert (args.tensor_parallel_size, args.additional_config) == (2, {})
    assert config.parallel_config.tensor_parallel_size == config.parallel_config.world_size == 4
    assert config.parallel_config.worker_cls == "vllm_shift.worker_cpu.ShiftCPUWorker"
    assert config.additional_config[CONFIG_KEY] == {
        "tensor_parallel_size": 2,
        "ulysses_sequence_parallel_size": 2,
        "enable_shift_parallel": True,
        "shift_parallel_threshold": 99,
        "self_check": True,
    }
    assert not custom_op.op_registry_oot


def test_settings_in_additional_config_equal_flags(llama, caplog_vllm):
    by_flags = create(llama, tensor_parallel_size=2, **SHIFT)
    by_dict = create(llama, additional_config={CONFIG_KEY: SHIFT | {"tensor_parallel_size": 2}})
    mixed = create(llama, tensor_parallel_size=2, enable_shift_parallel=True,
                   additional_config={CONFIG_KEY: {"ulysses_sequence_parallel_size": 2}})  # fmt: skip
    assert by_flags.additional_config == by_dict.additional_config == mixed.additional_config
    assert by_dict.parallel_config.world_size == 4
    assert "Shift Parallelism is off" not in caplog_vllm.text
    stock = create(llama, additional_config={CONFIG_KEY: {"tensor_parallel_size": 2}})
    assert "Shift Parallelism is off: ulysses_sequence_parallel_size is 1" in caplog_vllm.text
    assert stock.parallel_config.world_size == 2
    assert stock.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


def test_the_compile_cache_tells_engines_apart(llama, tmp_path, monkeypatch):
    def cache(**settings):
        config = create(llama, compilation_config={"cache_dir": str(tmp_path)}, **settings)
        return config.compilation_config.cache_dir, config.compute_hash()

    engines = [{"tensor_parallel_size": 4}, SHIFT, SHIFT | {"tensor_parallel_size": 2}]
    found = [cache(**settings) for settings in engines]
    assert found == [cache(**settings) for settings in engines]
    assert found[0][0] == str(tmp_path)
    assert all(folder.startswith(str(tmp_path)) for folder, _ in found)
    # The layout of weights may be another one after an upgrade.
    monkeypatch.setattr(translate, "code_hash", lambda: "other")
    found.append(cache(**SHIFT))
    assert len({folder for folder, _ in found}) == len({config_hash for _, config_hash in found}) == 4


NVFP4 = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}

BAD = [
    ({"ulysses_sequence_parallel_size": 3}, r"SP x TP = 3 ranks .*attention heads 8.*that work: \[2, 4, 8\]"),
    ({"ulysses_sequence_parallel_size": 16}, r"SP x TP = 16 ranks"),
    ({"enable_shift_parallel": True, "ulysses_sequence_parallel_size": 1}, "set --ulysses-sequence-parallel-size to 2"),
    ({"shift_parallel_threshold": -5}, "at least 0, or 'auto', got -5"),
    ({"shift_parallel_threshold": "many"}, "got 'many'"),
    ({"pipeline_parallel_size": 2}, r"pipeline parallelism with executors .*\(mp\): tried with external_launcher only"),
    ({"enable_lora": True, "fully_sharded_loras": True}, "fully sharded LoRA: leave out --fully-sharded-loras"),
    ({"speculative_config": NGRAM | {"method": "ngram_gpu"}}, r"speculative decoding other than .*\(ngram_gpu\): use"),
    ({"speculative_config": NGRAM, "pipeline_parallel_size": 2}, "pipeline parallelism together with speculative"),
    ({"quantization": "experts_int8"}, r"quantization methods other than FP8, .* \(experts_int8\)"),
    ({"dtype": "bfloat16", "hf_overrides": NVFP4}, r"quantization methods other than FP8, .* \(modelopt_fp4\)"),
    ({"model_impl": "transformers", "quantization": "fp8"}, r"models of transformers \(fp8\)"),
    ({"load_format": "sharded_state"}, r"load formats .*\(sharded_state\)"),
    ({"worker_cls": "my.Worker"}, "--worker-cls my.Worker"),
    ({"additional_config": {CONFIG_KEY: {"threshold": 3}}}, r"unknown keys \['threshold'\]"),
    ({"additional_config": {"other": 1, "shift-parallel": {}}}, "has 'shift-parallel', which is spelt 'shift_para"),
    ({"ulysses_sequence_parallel_size": 1, "enable_shift_parallel": False, "additional_config": SHIFT},
     r"has 'ulysses_.*', which belongs in additional_config\['shift_parallel'\]"),
    ({"additional_config": {"shift-parallel-threshold": 3}}, "has 'shift-parallel-threshold', which belongs in"),
    ({"additional_config": {CONFIG_KEY: {"ulysses_sequence_parallel_size": 4}}}, "4 in additional.*give it once"),
]  # fmt: skip


@pytest.mark.parametrize(("kwargs", "message"), BAD, ids=lambda value: str(value)[:40])
def test_refusals_name_the_value_and_what_would_work(llama, kwargs, message):
    with pytest.raises(ValueError, match=message):
        create(llama, **(SHIFT | kwargs))


def test_a_threshold_that_no_step_exceeds_is_named(llama, caplog_vllm):
    create(llama, shift_parallel_threshold=64, max_num_batched_tokens=128, **SHIFT)
    assert "SP mode will never run" not in caplog_vllm.text
    create(llama, shift_parallel_threshold=128, max_num_batched_tokens=128, **SHIFT)
    assert "SP mode will never run: the threshold of 128 tokens" in caplog_vllm.text
    # vLLM keeps room for what a draft model adds.
    caplog_vllm.clear()
    create(llama, shift_parallel_threshold=100, max_num_batched_tokens=128, max_num_scheduled_tokens=100, **SHIFT)
    assert "not below the largest step, 100 tokens" in caplog_vllm.text


def test_more_ranks_than_numa_nodes_is_refused_with_its_remedy(llama, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    with pytest.raises(ValueError, match=r"8 ranks.*set VLLM_CPU_OMP_THREADS_BIND=nobind"):
        create(llama, tensor_parallel_size=4, **SHIFT)


def test_more_ranks_than_gpus_is_refused(monkeypatch):
    gpus = SimpleNamespace(is_cuda=lambda: True, device_count=lambda: 4)
    monkeypatch.setattr(translate, "current_platform", gpus)
    one_host = SimpleNamespace(distributed_executor_backend=None, nnodes=1)
    translate._check_devices(4, one_host)
    with pytest.raises(ValueError, match="8 ranks need as many GPUs, found 4"):
        translate._check_devices(8, one_host)
    translate._check_devices(8, SimpleNamespace(distributed_executor_backend="ray", nnodes=1))


@pytest.mark.parametrize("nightly", [False, True])
def test_groups_start_the_engines_of_the_cases_only(monkeypatch, tmp_path, nightly):
    # One that is refused ends its rank, and with it all that the group has run.
    monkeypatch.setattr("rank_group.run_ranks", lambda *args, **kwargs: [])
    monkeypatch.setattr(tiny, "make_checkpoint", lambda name, folder: folder / name)
    started = {engine["name"] for engine in Group(4, nightly, tmp_path).engines}
    cases = [case for case in CASES if (case.world, case.nightly) == (4, nightly)]
    ours, stock = {f"{case.name}-{case.sp}x{case.tp}" for case in cases}, {f"{case.name}-stock" for case in cases}
    assert started == ours | stock


def test_versions_agree():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{vllm_shift.__version__}"' in project
    assert project.count(f"=={plugin.SUPPORTED_VLLM}") == 2


@pytest.mark.parametrize(
    ("threshold", "most", "hidden", "chosen_by_user", "more", "more_if_full"),
    [
        (100, 1024, 4096, False, [100, *range(576, 1000, 64), 1000, 1024], [100]),
        ("auto", 1024, 4096, False, [*range(576, 1000, 64), 1000, 1024], []),
        # 1,536 a rank; fewer in a wide model.
        (256, 65536, 4096, False, [*range(576, 1000, 64), 1000, *range(1024, 2048, 128), *range(2048, 3073, 256)], []),
        (256, 65536, 1024, False, [*range(576, 1000, 64), 1000, *range(1024, 2048, 128), *range(2048, 3073, 256)], []),
        (256, 65536, 8192, False, [576, 640, 704, 768], []),
        (256, 65536, 16384, False, [], []),
        (100, 65536, 4096, True, [100], [100]),
    ],
)
def test_a_config_gains_cuda_graph_sizes(threshold, most, hidden, chosen_by_user, more, more_if_full):
    scheduler = SimpleNamespace(max_num_batched_tokens=most)
    model = SimpleNamespace(get_hidden_size=lambda: hidden)
    # In full graphs of all steps attention would split keys in larger ones.
    for mode, gained in ((CUDAGraphMode.FULL_AND_PIECEWISE, more), (CUDAGraphMode.FULL, more_if_full)):
        compilation = SimpleNamespace(
            cudagraph_capture_sizes=[*STOCK_SIZES], max_cudagraph_capture_size=512, cudagraph_mode=mode,
            compile_sizes=[16, 1000, 8000],
        )  # fmt: skip
        config = SimpleNamespace(compilation_config=compilation, scheduler_config=scheduler, model_config=model)
        set_graph_sizes(config, ShiftConfig(1, 2, True, threshold), chosen_by_user)
        assert sorted(set(compilation.cudagraph_capture_sizes) - set(STOCK_SIZES)) == gained
        assert compilation.max_cudagraph_capture_size == compilation.cudagraph_capture_sizes[-1]


@pytest.mark.parametrize("compiled", [[16], ["cudagraph_capture_sizes"]])
def test_an_engine_without_cuda_graphs_gains_none(llama, compiled):
    compilation = create(llama, compilation_config={"compile_sizes": compiled}, **SHIFT).compilation_config
    assert not compilation.cudagraph_capture_sizes


def test_cuda_graph_sizes_of_the_user_are_known_as_such(llama, monkeypatch):
    found = []
    monkeypatch.setattr(translate, "set_graph_sizes", lambda config, shift, by_user: found.append(by_user))
    create(llama, **SHIFT)
    create(llama, compilation_config={"cudagraph_capture_sizes": [1, 2]}, **SHIFT)
    create(llama, max_cudagraph_capture_size=8, **SHIFT)
    assert found == [False, True, True]


def test_architectures_not_tested_need_the_self_check(llama, monkeypatch):
    monkeypatch.setattr(limits, "TESTED", ())
    create(llama, **SHIFT)
    with pytest.raises(ValueError, match=r"with the self-check off \(LlamaForCausalLM\)"):
        create(llama, additional_config={CONFIG_KEY: {"self_check": False}}, **SHIFT)


@pytest.mark.parametrize(
    ("given", "engines"),
    [
        ({}, 4),
        ({"data_parallel_size_local": 2}, 2),
        ({"data_parallel_size_local": 0}, 0),
        ({"data_parallel_rank": 3}, 1),
        ({"data_parallel_external_lb": True}, 1),
    ],
)
def test_engines_of_this_host(given, engines):
    nothing = dict.fromkeys(("data_parallel_size_local", "data_parallel_rank", "data_parallel_external_lb"))
    assert translate._local_engines(SimpleNamespace(**nothing | {"data_parallel_size": 4} | given)) == engines


def test_all_engines_and_stages_need_places(llama, monkeypatch):
    asked = []
    monkeypatch.setattr(translate, "_check_devices", lambda ranks, args: asked.append(ranks))
    create(llama, tensor_parallel_size=2, data_parallel_size=3, **SHIFT)
    with pytest.raises(ValueError, match="tried with external_launcher"):
        create(llama, pipeline_parallel_size=2, **SHIFT)
    assert asked == [12, 4]


@pytest.mark.parametrize("threshold", [0, 1, 100, 256, 500, 512, 700, 10_000])
def test_no_graph_size_pads_a_batch_into_the_other_mode(threshold):
    sizes = graph_sizes(STOCK_SIZES, threshold, extend_to=8192)
    assert set(STOCK_SIZES) <= set(sizes)
    assert sizes == sorted(set(sizes))
    for num_tokens in range(1, sizes[-1] + 1):
        padded = next(size for size in sizes if size >= num_tokens)
        assert (padded > threshold) == (num_tokens > threshold)


@pytest.mark.parametrize("last", [16, 32, 128, 256])
def test_graph_sizes_have_no_hole_where_few_requests_decode(last):
    stock = [size for size in STOCK_SIZES if size <= last]
    sizes = graph_sizes(stock, 0, extend_to=2048)
    assert sizes[: len(stock)] == stock
    between = [size for size in sizes if last <= size <= 1024]
    assert max(after - before for before, after in itertools.pairwise(between)) <= 64
    # A threshold that was measured is hardly lowered.
    assert fit_to_graphs(430, sizes) == 416


def test_graph_sizes_respect_the_user_and_the_token_budget():
    assert graph_sizes([1, 8], 256, 0) == [1, 8]
    assert graph_sizes([1, 512], 100, 1024)[-1] == 1024


def test_other_keys_of_additional_config_stay(llama):
    assert create(llama, additional_config={"other": 1}, **SHIFT).additional_config["other"] == 1


@pytest.mark.parametrize(
    ("given", "publishes"),
    [
        ({}, True),
        ({"disable_log_stats": True}, False),
        ({"_api_process_count": 2, "_api_process_rank": 1}, False),
        ({"_api_process_count": 2, "_api_process_rank": -1}, True),
        ({"nnodes": 2, "node_rank": 1, "distributed_executor_backend": "mp"}, False),
        ({"distributed_executor_backend": "external_launcher", "RANK": "0"}, True),
        ({"distributed_executor_backend": "external_launcher", "RANK": "1"}, False),
    ],
)
def test_the_process_that_has_the_engines_publishes(llama, monkeypatch, given, publishes):
    published = []
    monkeypatch.setattr(translate, "publish", published.append)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # which vLLM sets to 0 with external_launcher
    monkeypatch.setenv("RANK", given.get("RANK", "1"))
    config = create(llama, **SHIFT, **{name: value for name, value in given.items() if name != "RANK"})
    assert published == ([config] if publishes else [])


def test_as_many_ranks_as_numa_nodes_are_taken(monkeypatch):
    monkeypatch.setattr("vllm.utils.cpu_resource_utils.get_visible_memory_node", lambda: [0, 1])
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    monkeypatch.delenv("VLLM_CPU_SIM_MULTI_NUMA", raising=False)
    one_host = SimpleNamespace(distributed_executor_backend=None, nnodes=1)
    translate._check_devices(2, one_host)
    with pytest.raises(ValueError, match="3 ranks, but vLLM binds each to a NUMA node and there are 2"):
        translate._check_devices(3, one_host)
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
    translate._check_devices(3, one_host)


def test_the_owner_is_named(llama, monkeypatch):
    named = []
    monkeypatch.setattr(translate, "name_owner", lambda: named.append(1))
    create(llama, **SHIFT)
    assert named == [1]


def test_graph_sizes_that_are_no_multiples_gain_none_in_between():
    # As vLLM rounds sizes with five draft tokens a request.
    stock = [6, 12, 252, 258, 510]
    assert graph_sizes(stock, 0, 1024)[:5] == stock
