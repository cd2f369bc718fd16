"""The comparison of settings and steps across ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from agreement_rank import DIVERGENCES
from ports import free_ports

from vllm_shift.agreement import VARIABLE, debug_wanted

WORLD = 3


@pytest.fixture(scope="module")
def raised():
    """What each rank raised, by divergence."""
    command = [sys.executable, str(Path(__file__).with_name("agreement_rank.py"))]
    port = str(free_ports(1))
    ranks = [
        subprocess.Popen([*command, str(rank), str(WORLD), port], stdout=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.engine
@pytest.mark.parametrize("what", DIVERGENCES)
def test_a_rank_that_diverges_is_reported_by_every_rank(raised, what):
    found = {rank.get(what) for rank in raised}
    if what == "nothing":
        assert found == {None}
        return
    (message,) = found
    assert "the ranks disagree" in message
    assert "rank 0: step 2 in TP mode, 98 tokens of 3 requests" in message
    tokens, requests = sum(DIVERGENCES[what][1]), len(DIVERGENCES[what][1])
    mode = "SP" if what == "mode" else "TP"
    assert f"rank 2: step 2 in {mode} mode, {tokens} tokens of {requests} requests" in message


@pytest.mark.engine
def test_ranks_with_other_settings_are_named_by_every_rank(raised):
    assert not any("the same settings" in rank for rank in raised)
    (message,) = {rank["other settings"] for rank in raised}
    assert "shift_parallel_threshold is not the same on all ranks: rank 0: 256; rank 1: 256; rank 2: 'auto'" in message
    (message,) = {rank["another version"] for rank in raised}
    assert "of a newer version is not the same on all ranks: rank 0: None; rank 1: None; rank 2: 1" in message


def test_it_is_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not debug_wanted()
    monkeypatch.setenv(VARIABLE, "1")
    assert debug_wanted()
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
        debug_wanted()
