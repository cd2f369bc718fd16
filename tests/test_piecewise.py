"""Both modes compiled as on CUDA, see ``piecewise``: a trace of each, made at the first start, then loaded."""

import pytest
import tiny
from test_features import assert_equal_to_stock, run

pytestmark = pytest.mark.engine

# Starts, and how many traces each makes and loads: stock vLLM, ours. A second engine of a process has an exchange of
# another name, which is a part of SP mode's trace.
TRACES = {
    "first start": ((1, 0), (2, 0)),
    "next start": ((0, 1), (0, 2)),
    "next engine of a process": ((0, 1), (1, 1)),
    "experts": ((1, 0), (2, 0)),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    models, *folders = (tmp_path_factory.mktemp(name) for name in ("models", "first", "second"))
    (models / "cache").mkdir()
    model, experts = (str(tiny.make_checkpoint(name, models)) for name in ("llama", "mixtral"))
    tokens = {"ask": "tokens", "args": {}}
    processes = [
        {"first start": tokens, "experts": tokens | {"args": {"model": experts}}},
        {"next start": tokens, "next engine of a process": tokens},
    ]
    results = []
    for features, folder in zip(processes, folders, strict=True):
        (folder / "cache").symlink_to(models / "cache")
        results.append(run(2, 2, 1, features, model, folder, piecewise=True))
    return [before | after for before, after in zip(*results, strict=True)]


@pytest.mark.parametrize("name", TRACES)
def test_results_equal_stock_in_both_modes(two_ranks, name):
    assert_equal_to_stock(two_ranks, name)


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_for_each_mode_is_made_once(two_ranks, name):
    for result in two_ranks:
        for whose, (made, loaded) in zip(("stock", "ours"), TRACES[name], strict=True):
            expected = {"compiles": made, "artifacts_saved": made, "artifacts_loaded": loaded}
            assert all(each["traces"] == expected for each in result[name][whose])
        assert not any("holds up the start" in line for line in result[name]["ours"][0]["lines"])
