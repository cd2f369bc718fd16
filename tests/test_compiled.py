"""The twins of compiled modules, and the config that they are compiled with."""

from types import SimpleNamespace

import pytest
from torch import nn
from vllm.config import CompilationConfig, CompilationMode, PassConfig, get_current_vllm_config
from vllm.platforms import current_platform

from vllm_shift import compiled
from vllm_shift.compiled import CompiledTwins, config_of_twin
from vllm_shift.config import CONFIG_KEY, ShiftConfig
from vllm_shift.overlap import OverlapPass


def config_with(compilation, most_tokens=8192, **sizes):
    return SimpleNamespace(
        compilation_config=compilation,
        additional_config={CONFIG_KEY: ShiftConfig(**sizes).to_dict()},
        scheduler_config=SimpleNamespace(max_num_batched_tokens=most_tokens),
    )


def test_every_trace_has_a_cache_of_its_own():
    config = config_with(CompilationConfig(cache_dir="cache"))
    groups = [["sp:0"], ["sp:1"], ["sp:0", "ulysses_rows:0"], ["sp:0", "ulysses_tp:0"]]
    traced = [(through_peers, names) for through_peers in (False, True) for names in groups]
    everyone = [config, *(config_of_twin(config, *each) for each in traced)]
    assert len({each.compilation_config.cache_dir for each in everyone}) == 9
    assert len({str(each.additional_config) for each in everyone}) == 9


def test_what_is_compiled_for_rows_of_tp_mode_stays_there():
    passes = PassConfig(fuse_allreduce_rms=True)
    stock = CompilationConfig(compile_sizes=[8], compile_ranges_endpoints=[256, 8192], pass_config=passes)
    twin = config_of_twin(config_with(stock), through_peers=False, groups=["ulysses_sp:0"]).compilation_config
    assert (twin.compile_sizes, twin.compile_ranges_endpoints) == ([], [8192])
    assert not twin.pass_config.fuse_allreduce_rms
    assert (stock.compile_sizes, stock.compile_ranges_endpoints) == ([8], [256, 8192])
    assert stock.pass_config.fuse_allreduce_rms


@pytest.mark.parametrize(("sp", "tp", "most_tokens", "rows"), [(2, 2, 2047, 2048), (3, 1, 8192, 8193)])
def test_a_trace_is_for_all_rows_of_the_largest_step(sp, tp, most_tokens, rows):
    stock = CompilationConfig(compile_ranges_endpoints=[most_tokens])
    config = config_with(stock, most_tokens, ulysses_sequence_parallel_size=sp, tensor_parallel_size=tp)
    (only,) = config_of_twin(
        config, through_peers=False, groups=["ulysses_sp:0"]
    ).compilation_config.get_compile_ranges()
    assert (only.start, only.end) == (1, rows)


@pytest.mark.parametrize("through_peers", [False, True])
def test_no_kernels_are_tried_for_sp_mode(through_peers):
    stock = CompilationConfig()
    stock.inductor_compile_config = {"combo_kernels": True, "benchmark_combo_kernel": True, "other": 1}
    twin = config_of_twin(config_with(stock), through_peers, groups=["sp:0"]).compilation_config
    found = {name: twin.inductor_compile_config[name] for name in stock.inductor_compile_config}
    assert found == {"combo_kernels": True, "benchmark_combo_kernel": False, "other": 1}
    assert stock.inductor_compile_config["benchmark_combo_kernel"]


def test_a_pass_of_the_users_own_stays(caplog_vllm):
    key, theirs = current_platform.pass_key, object()
    found = []
    for passes in ({}, {key: theirs}):
        compilation = CompilationConfig()
        compilation.inductor_compile_config = passes
        twin = config_of_twin(config_with(compilation), through_peers=True, groups=["ulysses_sp:0"])
        found.append(twin.compilation_config.inductor_compile_config[key])
        assert ("in the place of OverlapPass" in caplog_vllm.text) is bool(passes)
        assert compilation.inductor_compile_config is passes
        assert passes in ({}, {key: theirs})
    assert isinstance(found[0], OverlapPass)
    assert found[1] is theirs


class Wrapper:
    """As vLLM's, which traces with the config that is current when it is initialized."""

    def __init__(self, prefix, is_encoder):
        self._compile_prefix, self._is_encoder = prefix, is_encoder
        self.traced_with = get_current_vllm_config()
        self.cleaned_up = False

    def cleanup(self):
        self.cleaned_up = True

    def save_aot_compiled_function(self):
        raise NotImplementedError


class Compiled(nn.Module, Wrapper):
    def __init__(self, prefix="", is_encoder=False, do_not_compile=False):
        super().__init__()
        self._compile_prefix, self._is_encoder, self.do_not_compile = prefix, is_encoder, do_not_compile
        self.weight = nn.Parameter(nn.Linear(2, 2).weight.detach())


@pytest.fixture
def wrapped(monkeypatch):
    monkeypatch.setattr(compiled, "TorchCompileWithNoGuardsWrapper", Wrapper)
    model = nn.Module()
    model.language = nn.Sequential(Compiled("layers"), Compiled(do_not_compile=True), nn.Linear(2, 2))
    model.vision = Compiled("vision", is_encoder=True)
    return model


def test_each_compiled_module_of_the_language_model_has_a_twin(wrapped):
    config = config_with(CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cache_dir="cache"))
    stock = list(wrapped.modules())
    twins = CompiledTwins(wrapped, config, through_peers=False, groups=["ulysses_sp:0"])
    assert twins
    twins.swap(in_sp=True)
    twin = wrapped.language[0]
    assert [a for a, b in zip(stock, wrapped.modules(), strict=True) if a is not b] == [stock[2]]
    assert twin.weight is stock[2].weight
    assert twin._compile_prefix == "layers"
    assert twin.traced_with is twin.vllm_config is not config
    assert twin.compilation_config.cache_dir != "cache"
    for module in (stock[2], twin):
        saved = module.save_aot_compiled_function
        assert saved.func == twins.saves._start
        assert saved.args[0].__self__ is module
    twins.swap(in_sp=False)
    assert all(a is b for a, b in zip(stock, wrapped.modules(), strict=True))


def test_a_compiled_module_with_two_parents_has_one_twin(wrapped):
    stock = wrapped.again = wrapped.language[0]
    config = config_with(CompilationConfig(mode=CompilationMode.VLLM_COMPILE))
    twins = CompiledTwins(wrapped, config, through_peers=False, groups=["ulysses_sp:0"])
    twins.swap(in_sp=True)
    twin = wrapped.language[0]
    assert wrapped.again is twin is not stock
    for module in (stock, twin):
        # Taken over once: what saves in the background is vLLM's own method, of this module.
        assert module.save_aot_compiled_function.args[0].__func__ is Wrapper.save_aot_compiled_function
        assert module.save_aot_compiled_function.args[0].__self__ is module
    twins.swap(in_sp=False)
    assert wrapped.again is wrapped.language[0] is stock


def test_what_vllm_cleans_up_in_a_model_is_cleaned_up_in_its_twins(wrapped):
    config = config_with(CompilationConfig(mode=CompilationMode.VLLM_COMPILE))
    twins = CompiledTwins(wrapped, config, through_peers=False, groups=["ulysses_sp:0"])
    stock = wrapped.language[0]
    twins.swap(in_sp=True)
    twin = wrapped.language[0]
    twins.swap(in_sp=False)
    assert not twin.cleaned_up
    stock.cleanup()
    assert stock.cleaned_up
    assert twin.cleaned_up


def test_without_vllms_compilation_there_are_no_twins(wrapped):
    config = config_with(CompilationConfig(mode=CompilationMode.NONE))
    assert not CompiledTwins(wrapped, config, through_peers=False, groups=["ulysses_sp:0"])


def test_a_model_that_is_compiled_as_a_whole_is_refused(wrapped):
    config = config_with(CompilationConfig(mode=CompilationMode.VLLM_COMPILE))
    with pytest.raises(NotImplementedError, match="Compiled is compiled as a whole"):
        CompiledTwins(Compiled(), config, through_peers=False, groups=["ulysses_sp:0"])
