"""Traces, generators, the arithmetic of reports, and replays against a server that fails on purpose."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from fake_server import FakeServer, running_server
from matplotlib.legend import Legend
from PIL import Image

from vllm_shift_cli.errors import CommandError
from vllm_shift_cli.main import main
from vllm_shift_cli.replay import client, plot
from vllm_shift_cli.replay import report as reports
from vllm_shift_cli.replay.generate import bursty, diurnal, generate, steady
from vllm_shift_cli.replay.modes import ModeSampler, parse
from vllm_shift_cli.replay.prompts import BLOCK, prompt_ids
from vllm_shift_cli.replay.run import Options, Replay, replay
from vllm_shift_cli.replay.trace import TraceError, TraceRequest, read_trace, schedule, write_trace


@pytest.fixture(scope="module")
def running():
    with running_server() as server:
        yield server


@pytest.fixture
def server(running):
    running.reset()
    return running


def written(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


# Traces


def test_our_own_format(tmp_path):
    path = written(tmp_path, '{"arrival_s": 1, "prompt_tokens": 3, "output_tokens": 4}\n\n'
                             '{"output_tokens": 6, "arrival_s": 0.5, "prompt_tokens": 5, "note": "x"}')  # fmt: skip
    assert read_trace(path) == ("jsonl", [TraceRequest(1.0, 3, 4), TraceRequest(0.5, 5, 6)])


def test_the_azure_format(tmp_path):
    path = written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:00:00.9799600,4808,10\r\n"
                             "2023-11-16 18:00:02.0000000,3180,8\r\n2023-11-16 19:00:02+01:00,7,1\r\n")  # fmt: skip
    name, requests = read_trace(path)
    assert name == "azure"
    assert [(r.prompt_tokens, r.output_tokens) for r in requests] == [(4808, 10), (3180, 8), (7, 1)]
    assert [r.arrival for r in schedule(requests)] == pytest.approx([0, 1.02004, 1.02004])


def test_the_mooncake_format(tmp_path):
    path = written(tmp_path, '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'
                             '{"timestamp": 30535, "input_length": 7, "output_length": 6, "hash_ids": []}')  # fmt: skip
    assert read_trace(path) == (
        "mooncake", [TraceRequest(27.482, 6955, 52, (46, 47)), TraceRequest(30.535, 7, 6)]
    )  # fmt: skip


GOOD = '{"arrival_s": 0, "prompt_tokens": 3, "output_tokens": 4}\n'
BAD = {
    '{"arrival_s": 0, "prompt_tokens": 3}': "output_tokens is missing",
    '{"arrival_s": -1, "prompt_tokens": 3, "output_tokens": 4}': "arrival_s must be a number from 0 to 1e+15, got -1",
    f'{{"arrival_s": {10**400}, "prompt_tokens": 3, "output_tokens": 4}}': "got 1000",
    '{"arrival_s": NaN, "prompt_tokens": 3, "output_tokens": 4}': "got nan",
    '{"arrival_s": "0", "prompt_tokens": 3, "output_tokens": 4}': "got '0'",
    '{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 4}': "prompt_tokens must be a whole number from 1 to",
    '{"arrival_s": 0, "prompt_tokens": 99999999999999999999, "output_tokens": 4}': "got 99999999999999999999",
    '{"arrival_s": 0, "prompt_tokens": 3, "output_tokens": 4.5}': "got 4.5",
    '{"arrival_s": 0, "prompt_tokens": true, "output_tokens": 4}': "got True",
    '{"arrival_s": 0,': "not JSON",
    "[1]": r"expected a JSON object, got \[1\]",
}


def test_bad_lines_are_all_named_by_number(tmp_path):
    path = written(tmp_path, GOOD + "\n".join(BAD) + "\n" + GOOD)
    with pytest.raises(TraceError) as error:
        read_trace(path)
    lines = str(error.value).splitlines()
    assert lines[0].endswith(f"{len(BAD)} bad lines; nothing has been sent")
    for number, (line, problem) in enumerate(zip(lines[1:], BAD.values(), strict=True), 2):
        assert line.startswith(f"  line {number}: ")
        assert problem.replace("\\", "") in line


def test_a_line_ends_where_json_says_so(tmp_path):
    path = tmp_path / "trace"
    path.write_text(GOOD.replace("{", '{"note": "\u2028", ') + GOOD, encoding="utf-8")
    assert len(read_trace(path)[1]) == 2


def test_other_formats_name_their_bad_lines(tmp_path):
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n2023-11-16 18:00:00,-1,1\n2023-11-16 18:00:00,1\n"
    with pytest.raises(TraceError, match=r"(?s)line 2: TIMESTAMP.*line 3: ContextTokens.*line 4: expected 3 columns"):
        read_trace(written(tmp_path, azure))
    with pytest.raises(TraceError, match="line 2: field larger than field limit"):
        read_trace(written(tmp_path, f"TIMESTAMP,ContextTokens,GeneratedTokens\n{'1' * 200_000},1,1\n"))
    with pytest.raises(TraceError, match="line 1: maximum recursion depth"):
        read_trace(written(tmp_path, '{"arrival_s": ' + "[" * 200_000))
    mooncake = '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0.5]}'
    with pytest.raises(TraceError, match="line 1: hash_ids"):
        read_trace(written(tmp_path, mooncake))


def test_many_bad_lines_are_counted(tmp_path):
    with pytest.raises(TraceError) as error:
        read_trace(written(tmp_path, GOOD + "{}\n" * 25))
    assert len(error.value.problems) == 25
    assert str(error.value).splitlines()[-2:] == ["  line 21: arrival_s is missing", "  and 5 more"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", r"no known format.*'a,b'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no req"),
    ],
)
def test_a_file_without_requests_is_refused(tmp_path, text, message):
    with pytest.raises(CommandError, match=message):
        read_trace(written(tmp_path, text))
    with pytest.raises(CommandError, match=r"cannot read the trace .*No such file"):
        read_trace(tmp_path / "missing")


def test_a_schedule_is_in_order_from_zero_and_as_fast_as_asked():
    requests = [TraceRequest(9.0, 1, 1), TraceRequest(5.0, 2, 2, (7,)), TraceRequest(6.0, 3, 3)]
    assert schedule(requests, speed=2.0, most=2) == [TraceRequest(0.0, 2, 2, (7,)), TraceRequest(0.5, 3, 3)]


# Generators


def make(rate, most, duration=1000.0, seed=0):
    return np.array([r.arrival for r in generate(rate, most, duration, (10, 20), (1, 3), seed)])


def assert_count(found: int, expected: float) -> None:
    """Within four standard deviations of a Poisson count."""
    assert abs(found - expected) < 4 * expected**0.5


def test_steady_traffic():
    arrivals = make(steady(20.0), 20.0)
    for begin in range(0, 1000, 100):
        assert_count(((arrivals >= begin) & (arrivals < begin + 100)).sum(), 2000)
    # Poisson: gaps have the standard deviation of their mean.
    assert np.diff(arrivals).std() == pytest.approx(0.05, rel=0.05)


def test_bursty_traffic():
    phase = make(bursty(5.0, 50.0, 20.0, 4.0), 50.0) % 20
    assert_count((phase >= 16).sum(), 50 * 4 * 50)
    assert_count((phase < 16).sum(), 50 * 16 * 5)


def test_diurnal_traffic():
    arrivals = make(diurnal(10.0, 50.0, 1000.0), 50.0)
    assert_count(len(arrivals), 30_000)
    assert_count((arrivals < 50).sum(), 50 * (30 - 20 * np.sin(0.1 * np.pi) / (0.1 * np.pi)))
    assert_count(((arrivals > 450) & (arrivals < 550)).sum(), 100 * (30 + 20 * np.sin(0.1 * np.pi) / (0.1 * np.pi)))


def test_a_seed_gives_one_trace_and_lengths_keep_their_range(tmp_path):
    first, again, other = (generate(steady(5.0), 5.0, 100.0, (10, 20), (1, 3), seed) for seed in (1, 1, 2))
    assert first == again != other
    assert {r.prompt_tokens for r in first} == set(range(10, 21))
    assert {r.output_tokens for r in first} == {1, 2, 3}
    write_trace(tmp_path / "trace", first)
    _, read = read_trace(tmp_path / "trace")
    assert [r.prompt_tokens for r in read] == [r.prompt_tokens for r in first]
    assert [r.arrival for r in read] == pytest.approx([r.arrival for r in first], abs=1e-6)


@pytest.mark.parametrize("length", [1, 511, 512, 513, 3000])
def test_prompts_have_their_length_and_share_what_the_trace_shares(length):
    blocks = (4, 8, 15)
    first = prompt_ids(TraceRequest(0, length, 1, blocks), 0, seed=3)
    assert len(first) == length
    assert first == prompt_ids(TraceRequest(0, length, 1, blocks), 0, seed=3)
    assert first != prompt_ids(TraceRequest(0, length, 1, blocks), 0, seed=4)
    other = prompt_ids(TraceRequest(0, length, 1, (4, 9)), 1, seed=3)
    assert first[:BLOCK] == other[:BLOCK]
    assert length <= BLOCK or first[BLOCK:] != other[BLOCK:]
    unique = [prompt_ids(TraceRequest(0, 40, 1), index, seed=3) for index in range(2)]
    assert unique[0] != unique[1]


# Reports


def outcome(due, sent, first=None, last=None, prompt=10, output=5, error=None, **got):
    ended = last if last is not None else sent + 1
    got = {"got_prompt_tokens": prompt, "got_output_tokens": output} | got
    return {"due": due, "sent": sent, "first": first, "last": last, "ended": ended, "prompt_tokens": prompt,
            "output_tokens": output, "error": error} | got  # fmt: skip


def sample(at, tp, sp):
    return {"time": at, "tp_steps": tp, "sp_steps": sp, "tp_tokens": tp, "sp_tokens": sp * 100, "mode_changes": sp * 2,
            "threshold": 32}  # fmt: skip


@pytest.fixture
def report():
    """Four answers and two failures, by hand. The percentiles of 1, 2, 3, 4 are 2.5 (p50), 3.7 (p90) and 3.97 (p99)."""
    found = {
        "format": reports.FORMAT, "interrupted": False, "planned": 7, "seconds": 10.0, "mode_problems": {},
        "settings": {"trace": "by hand", "model": "none"},
        "requests": [
            outcome(0.0, 0.0, 1.0, 3.0, prompt=100, output=5),  # TTFT 1, TPOT 2/4, completion 3
            outcome(1.0, 1.0, 3.0, 6.0, prompt=200, output=4),  # 2, 3/3, 5
            outcome(2.0, 2.0, 5.0, 9.0, prompt=300, output=3),  # 3, 4/2, 7
            outcome(3.0, 3.5, 7.5, 7.5, prompt=400, output=1),  # 4, none, 4
            outcome(4.0, 4.0, error="HTTP 500: request 7 failed"),
            outcome(5.0, 5.0, error="HTTP 500: request 8 failed"),
        ],
        "mode_samples": [sample(0.1, 5, 1), sample(9.9, 25, 4)],
    }  # fmt: skip
    return found | {"summary": reports.summarize(found)}


def test_the_arithmetic_of_a_report(report):
    summary = report["summary"]
    assert [summary[name] for name in ("sent", "completed", "failed", "never_sent", "other_length")] == [6, 4, 2, 1, 0]
    latency = summary["latencies"]
    assert latency["ttft"] == pytest.approx({"p50": 2.5, "p90": 3.7, "p99": 3.97, "mean": 2.5, "max": 4.0})
    assert latency["tpot"] == pytest.approx({"p50": 1.0, "p90": 1.8, "p99": 1.98, "mean": 3.5 / 3, "max": 2.0})
    assert latency["completion"] == pytest.approx({"p50": 4.5, "p90": 6.4, "p99": 6.94, "mean": 4.75, "max": 7.0})
    assert (summary["prompt_tokens"], summary["output_tokens"]) == (1000, 13)
    assert summary["requests_per_s"] == pytest.approx(4 / 9)
    assert summary["prompt_tokens_per_s"] == pytest.approx(1000 / 9)
    assert summary["output_tokens_per_s"] == pytest.approx(13 / 9)
    assert summary["failures"] == [{"reason": "HTTP 500: request 7 failed", "count": 2}]
    assert summary["modes"] == {"tp_steps": 20, "sp_steps": 3, "tp_tokens": 20, "sp_tokens": 300, "mode_changes": 6}
    assert summary["lateness"]["max"] == 0.5


def test_throughput_over_time(report, monkeypatch):
    monkeypatch.setattr(reports, "bin_width", lambda seconds: 2.0)
    bins = reports.throughput(report)
    # Tokens at 1 1.5 2 2.5 3, 3 4 5 6, 5 7 9 and 7.5.
    assert bins["edges"].tolist() == [0, 2, 4, 6, 8, 10]
    assert (bins["output"] * 2).tolist() == [2, 4, 3, 3, 1]
    assert (bins["prompt"] * 2).tolist() == [100, 200, 300, 400, 0]
    assert (bins["sent"] * 2).tolist() == [2, 2, 2, 0, 0]


def test_requests_in_flight(report):
    times, counts = reports.in_flight(report)
    assert counts.max() == 4
    assert counts[-1] == 0
    assert counts[times <= 2.5][-1] == 3


@pytest.mark.parametrize(("seconds", "width"), [(0.5, 0.1), (10, 0.1), (11, 0.2), (100, 1), (101, 2), (86400, 3600)])
def test_bins_are_round_and_at_most_a_hundred(seconds, width):
    assert reports.bin_width(seconds) == width


def test_a_report_says_what_to_doubt(report):
    report["interrupted"] = True
    report["requests"][0]["got_output_tokens"] = 4
    report["mode_problems"] = {"no metrics": 3}
    report["summary"] = reports.summarize(report)
    text = "\n".join(reports.warnings(report))
    for expected in ("1 of 7 requests were never sent", "2 of 6 requests have no complete answer",
                     "1 answers or prompts have another number", "within 0.48 s of when they were due",
                     "3 x no metrics"):  # fmt: skip
        assert expected in text


def test_a_restarted_server_counts_from_0_again(report):
    report["mode_samples"] = [sample(0.1, 5, 1), sample(5.0, 25, 4), sample(9.9, 3, 2), sample(12.0, 10, 2)]
    report["summary"] = reports.summarize(report)
    assert report["summary"]["modes"] == {
        "tp_steps": 27, "sp_steps": 3, "tp_tokens": 27, "sp_tokens": 300, "mode_changes": 6
    }  # fmt: skip
    assert "it has restarted" in "\n".join(reports.warnings(report))


def test_a_report_that_cannot_be_written_leaves_the_old_one(report, tmp_path, monkeypatch):
    path = tmp_path / "old.json"
    path.write_text("old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        reports.save(report, path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("old.json", "old")]


def test_names_are_shown_as_they_are(report, tmp_path, capsys, monkeypatch):
    name = "_x$\\frac$[bold].1"
    report["settings"]["trace"] = report["settings"]["model"] = "$x^$ \udcff"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        reports.save(report, tmp_path / folder / f"{name}.json")
    reports.save(report, tmp_path / f"{name[:-1]}2.json")
    labels = set()
    monkeypatch.setattr(plot, "_save", lambda figure, path, save=plot._save: (
        labels.update(text.get_text() for legend in figure.findobj(Legend) for text in legend.get_texts()),
        save(figure, path),
    ))  # fmt: skip
    out = ["--output", str(tmp_path / "out")]
    assert main(["compare", str(tmp_path / "a" / f"{name}.json"), *out]) == 0
    paths = [tmp_path / "a" / f"{name}.json", tmp_path / f"{name[:-1]}2.json"]
    assert main(["compare", *map(str, paths), *out]) == 0
    assert {f" {name}", f" {name[:-1]}2"} <= labels
    assert f"{name[:-1]}2" in capsys.readouterr().out
    assert main(["compare", *(str(tmp_path / folder / f"{name}.json") for folder in "ab"), *out]) == 0
    with pytest.raises(SystemExit):
        main(["compare", str(paths[0]), str(tmp_path / "b" / ".." / "a" / paths[0].name), *out])
    assert "the same report is given twice" in capsys.readouterr().err


def test_nothing_at_all_is_a_report_too(report, tmp_path):
    report["requests"], report["mode_samples"] = [], []
    report["summary"] = reports.summarize(report)
    assert report["summary"]["latencies"] == {"ttft": None, "tpot": None, "completion": None}
    path = tmp_path / "nothing.json"
    reports.save(report, path)
    assert main(["compare", str(path), "--output", str(tmp_path / "out")]) == 0


def test_modes_are_summed_over_engines():
    page = FakeServer()
    page.counts = {"tp": 3, "sp": 4, "tp_tokens": 30, "sp_tokens": 400, "changes": 5}
    text = asyncio.run(page.page(None)).text
    found = parse(text + text.replace('engine="0"', 'engine="1"'), 7.0)
    assert (found.time, found.tp_steps, found.sp_tokens, found.mode_changes) == (7.0, 6, 800, 10)
    assert found.threshold == 32  # which is no count
    assert parse("other 1.0\n", 0.0) is None


# Replays


def run(server, requests, **options):
    return asyncio.run(replay(requests, Options(server.url, **{"interval": 0.05} | options)))


def test_a_replay_sends_exactly_the_trace(server):
    requests = [TraceRequest(0.02 * number, 5 + number, 1 + number % 4) for number in range(20)]
    found = run(server, requests)
    assert found.model == "fake"
    assert [(len(body["prompt"]), body["max_tokens"], body["min_tokens"]) for body in server.bodies] == [
        (r.prompt_tokens, r.output_tokens, r.output_tokens) for r in requests
    ]
    for r, o in zip(requests, found.outcomes, strict=True):
        assert (o.error, o.got_prompt_tokens, o.got_output_tokens) == (None, r.prompt_tokens, r.output_tokens)
        assert r.arrival <= o.sent <= o.first <= o.last <= o.ended
    assert len(found.samples) >= 5
    assert found.samples[-1].tp_steps > found.samples[0].tp_steps
    assert not found.sample_problems


def test_every_failure_has_its_reason_and_disturbs_no_other_request(server):
    kinds = {
        server.HTTP_500: r"HTTP 500: request \d+ hit a wall",
        server.DROPPED: "ClientPayloadError|the stream broke off|ServerDisconnected",
        server.ERROR_EVENT: "error in the stream: the engine died",
        server.NO_USAGE: "ignores stream_options.include_usage",
        server.HANGS: "no complete answer within 1 s",
        server.BROKEN: "JSONDecodeError",
        server.BINARY: "HTTP 502: \ufffd",
        server.PLAIN: "the answer is no event stream, but application/json",
        **dict.fromkeys(server.ODD_EVENTS, "is no completion|RecursionError|LineTooLong"),
        **dict.fromkeys(server.ODD_COUNTS, "the usage has no valid numbers of tokens"),
    }
    requests = [TraceRequest(0.0, length, 4) for length in (*kinds, 5, 6)]
    found = run(server, requests, timeout=1.0)
    for o, pattern in zip(found.outcomes, kinds.values(), strict=False):
        assert re.search(pattern, o.error), o.error
    assert [o.error for o in found.outcomes[-2:]] == [None, None]
    assert found.failed == len(kinds)


def test_another_length_is_counted_not_failed(server):
    found = run(server, [TraceRequest(0.0, server.SHORT, 4)])
    report = reports.make_report(found, 1, {})
    assert (report["summary"]["completed"], report["summary"]["other_length"]) == (1, 1)


def test_a_slow_server_holds_nothing_up(server):
    server.pause = 0.3
    found = run(server, [TraceRequest(0.02 * number, 5, 3) for number in range(25)])
    assert all(o.error is None for o in found.outcomes)
    assert found.outcomes[-1].sent < found.outcomes[0].last


def test_a_server_that_is_not_there(server):
    with pytest.raises(CommandError, match=r"cannot ask http://127.0.0.1:9/v1/models"):
        asyncio.run(replay([TraceRequest(0, 1, 1)], Options("http://127.0.0.1:9")))
    found = asyncio.run(replay([TraceRequest(0, 1, 1)], Options("http://127.0.0.1:9", model="m")))
    assert "ClientConnectorError" in found.outcomes[0].error
    assert found.sample_problems


def test_a_server_without_our_metrics_is_named(server):
    server.metrics = False
    found = run(server, [TraceRequest(0, 1, 1)])
    (problem,) = found.sample_problems
    assert "runs without Shift Parallelism" in problem


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [('vllm:shift_steps_total{engine="0",mode="sp"', "x{", "lacks vllm:shift_ steps_total sp"),
     (" 32.0", " +Inf", "OverflowError"), (" 32.0", " NaN", "ValueError"), ("{", "", "ValueError")],
)  # fmt: skip
def test_a_bad_page_in_the_middle_is_counted_and_the_next_is_read(server, old, new, reason):
    def change(state):
        server.damage = (lambda text: text.replace(old, new)) if state.ended == 1 else str

    found = asyncio.run(
        replay([TraceRequest(at, 5, 2) for at in (0, 0.2, 0.4)], Options(server.url, interval=0.05), change)
    )
    assert reason in " ".join(found.sample_problems)
    assert found.samples[-2].time > found.outcomes[1].sent
    assert not found.failed


def stopped(server, requests, when):
    """A replay that is cancelled as soon as ``when`` says so, looked at after each change and in between."""

    async def run():
        state = Replay()

        def change(now):
            state.__dict__ |= now.__dict__
            if when(state):
                task.cancel()

        task = asyncio.create_task(replay(requests, Options(server.url), change))
        await asyncio.wait([task], timeout=0.3)
        task.cancel()
        return await task

    return asyncio.run(run())


def test_a_request_that_is_stopped_before_it_starts_is_reported(server):
    requests = [TraceRequest(0, 5, 2), TraceRequest(0.05, 5, 2)]
    found = stopped(server, requests, lambda state: len(state.outcomes) == 2)
    report = reports.make_report(found, 2, {})
    assert report["requests"][1]["error"].startswith("interrupted")
    assert report["requests"][1]["ended"] is not None
    assert (found.ended, len(server.bodies)) == (2, 1)


def test_a_stop_during_the_last_look_at_the_mode_loses_nothing(server):
    def when(state):
        if state.ended:
            server.hanging = {"metrics"}

    found = stopped(server, [TraceRequest(0, 5, 2)], when)
    assert found.interrupted
    assert [o.error for o in found.outcomes] == [None]


def test_a_server_that_does_not_say_its_model(server, monkeypatch):
    server.hanging = {"models"}
    monkeypatch.setattr(client, "_MODELS_TIMEOUT", 0.1)
    with pytest.raises(CommandError, match=r"cannot ask .*/v1/models for the model \(TimeoutError"):
        run(server, [TraceRequest(0, 1, 1)])


# The command line


def test_the_command_from_trace_to_comparison(server, tmp_path, capsys):
    trace = tmp_path / "steady.jsonl"
    assert main(["trace", "steady", str(trace), "--rate", "30", "--duration", "1", "--prompt-tokens", "4-60",
                 "--output-tokens", "2-5"]) == 0  # fmt: skip
    count = len(trace.read_text().splitlines())
    for name, speed in (("a", "1"), ("b", "4")):
        assert main(["replay", str(trace), "--url", server.url + "/v1/", "--speed", speed, "--interval", "0.1",
                     "--output", str(tmp_path / name)]) == 0  # fmt: skip
    report = reports.load(tmp_path / "a.json")
    assert report["summary"]["completed"] == count == len(server.bodies) / 2
    assert report["settings"]["trace format"] == "jsonl"
    (tmp_path / "c.json").mkdir()  # which compare does not write
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--output", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    assert f"{report['summary']['output_tokens']:,}" in out
    for name in "abc":
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 1000
        page = (tmp_path / f"{name}.html").read_text()
        assert "data:image/png;base64," in page
        assert f"{report['summary']['prompt_tokens']:,}" in page
    assert "http" not in page.replace(server.url, "").split("<h1>")[0]  # nothing is loaded from elsewhere


def test_failures_reach_the_page_escaped_and_the_exit_status(server, tmp_path, capsys):
    trace = tmp_path / "bad.jsonl"
    write_trace(trace, [TraceRequest(0, server.HTTP_500, 2), TraceRequest(0, 5, 2)])
    assert main(["replay", str(trace), "--url", server.url, "--output", str(tmp_path / "r"), "--model", "<b>m"]) == 1
    assert "1 x HTTP 500: request" in capsys.readouterr().out
    page = (tmp_path / "r.html").read_text()
    assert "HTTP 500: request" in page
    assert "&lt;b&gt;m" in page
    assert "<b>m" not in page


def test_bad_input_is_refused_before_anything_is_sent(server, tmp_path, capsys):
    bad = written(tmp_path, GOOD + "{}\n")
    good = tmp_path / "good"
    good.write_text(GOOD)
    (tmp_path / "taken.json").mkdir()
    for words, message in (
        ([bad], "line 2: arrival_s is missing"),
        ([good, "--output", tmp_path / "no" / "where"], "cannot write in the folder"),
        ([good, "--output", tmp_path / "taken"], "taken.json"),
        ([good, "--output", ""], "this is a folder; for files in it, try replay"),
        ([good, "--output", ".."], "try ../replay"),
        ([good, "--output", tmp_path], f"try {tmp_path}/replay"),
        ([good, "--speed", "0"], "must be a number above 0, got '0'"),
        ([good, "--speed", "fast"], "must be a number above 0, got 'fast'"),
        ([good, "--max-requests", "0"], "must be a whole number from 1 to 1,000,000,000, got '0'"),
        ([good, "--seed", "-1"], "must be a whole number of at least 0, got '-1'"),
        ([good, "--url", "localhost:8000"], "must begin with http:// or https://"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["replay", "--url", server.url, *map(str, words)])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    for words, message in (
        ("bursty x --rate 5 --peak 1 --period 9 --burst 1 --duration 9", "--peak is 1, below --rate 5"),
        ("bursty x --rate 5 --peak 6 --period 9 --burst 10 --duration 9", "--burst is 10 s, longer"),
        ("steady x --rate 5 --duration 9 --prompt-tokens 9-3", "must go from low to high"),
        ("steady x --rate 5 --duration 9 --prompt-tokens 5-", "must be a whole number from 1"),
        ("steady x --rate 1e12 --duration 9 --output-tokens 5", "9e+12 requests"),
        ("steady x --rate 1 --duration 9 --prompt-tokens 10000001", "from 1 to 10,000,000"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["trace", *words.split()])
        assert message in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "other.json")])
    assert "is not a report" in capsys.readouterr().err
    assert server.bodies == []


@pytest.mark.parametrize("part", sorted(reports.make_report(Replay(), 0, {})))
def test_a_report_without_a_part_is_refused(tmp_path, part):
    report = reports.make_report(Replay(), 0, {})
    reports.save({name: value for name, value in report.items() if name != part}, tmp_path / "part.json")
    with pytest.raises(CommandError, match=part):
        reports.load(tmp_path / "part.json")


@pytest.mark.parametrize(
    ("part", "value"),
    [("requests", None), ("requests", [{"due": 0.0}]), ("seconds", "x"), ("mode_samples", [{"time": "x"}]),
     ("settings", {}), ("mode_problems", []), ("mode_problems", {"x": "1"})],
)  # fmt: skip
def test_a_damaged_report_is_named(report, tmp_path, part, value):
    reports.save(report | {part: value}, tmp_path / "bad.json")
    with pytest.raises(CommandError, match=r"bad.json is a damaged report"):
        reports.load(tmp_path / "bad.json")


def test_what_cannot_be_written_or_drawn_is_said_after_the_table(server, tmp_path, capsys, monkeypatch):
    trace = written(tmp_path, GOOD)
    words = ["replay", str(trace), "--url", server.url, "--output", str(tmp_path / "r")]

    def fail(*_):
        raise OSError(28, "No space left on device")

    for module, name, message in ((plot, "plot_report", "r.json is written, no picture: OSError"),
                                  (reports, "save", "r.json: No space left")):  # fmt: skip
        monkeypatch.setattr(module, name, fail)
        with pytest.raises(SystemExit) as error:
            main(words)
        assert error.value.code == 2
        out, err = capsys.readouterr()
        assert "Complete answers" in out
        assert message in err
    assert reports.load(tmp_path / "r.json")["summary"]["completed"] == 1


def interrupted(server, trace, folder, number, when):
    """Standard output and error of a replay that gets a signal."""
    command = [Path(sys.executable).with_name("vllm-shift"), "replay", trace, "--url", server.url]
    process = subprocess.Popen(
        [*command, "--output", folder / "r"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        # A shell that runs the tests in the background lets them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not when() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    return out.decode(), err.decode()


def test_ctrl_c_before_anything_is_sent(server, tmp_path):
    server.hanging = {"models"}
    _, err = interrupted(server, written(tmp_path, GOOD), tmp_path, signal.SIGINT, lambda: server.hung)
    assert err.endswith("vllm-shift: interrupted\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_what_has_finished(server, tmp_path, number):
    trace = tmp_path / "long.jsonl"
    write_trace(trace, [TraceRequest(0, 5, 2), TraceRequest(0, server.HANGS, 5), TraceRequest(1000, 5, 2)])
    out, _ = interrupted(server, trace, tmp_path, number, lambda: len(server.bodies) == 2)
    summary = reports.load(tmp_path / "r.json")["summary"]
    assert (summary["completed"], summary["failed"], summary["never_sent"]) == (1, 1, 1)
    assert "Interrupted: 1 of 3 requests were never sent" in out
    assert (tmp_path / "r.html").exists()


def test_the_command_needs_neither_vllm_nor_what_it_does_not_use(tmp_path):
    code = """
import sys
for name in ("vllm", "vllm_shift", "torch", "matplotlib"):
    sys.modules[name] = None  # importing it fails
from vllm_shift_cli.main import main
main(sys.argv[1:])
"""
    trace = written(tmp_path, GOOD)

    def call(*words):
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)

    assert "replay" in call("--help").stdout
    assert call("trace", "steady", str(tmp_path / "t"), "--rate", "9", "--duration", "9").returncode == 0
    found = call("replay", str(trace), "--model", "m", "--url", "http://127.0.0.1:9", "--output", str(tmp_path / "r"))
    assert found.returncode == 2
    assert "matplotlib is not installed; try: pip install 'vllm-shift[replay]'" in found.stderr
    assert json.loads((tmp_path / "r.json").read_text())["summary"]["failed"] == 1


def test_throughput_counts_from_the_first_request(report):
    for request in report["requests"]:
        for name in ("due", "sent", "first", "last", "ended"):
            if request[name] is not None:
                request[name] += 100
    summary = reports.summarize(report)
    assert summary["requests_per_s"] == pytest.approx(4 / 9)
    assert summary["latencies"]["completion"]["max"] == 7


def test_an_answer_of_two_tokens_has_a_tpot(report):
    report["requests"] = [outcome(0.0, 0.0, 1.0, 3.0, prompt=100, output=2)]
    assert reports.latencies(report, "tpot").tolist() == [2.0]


def test_a_clean_report_has_nothing_to_doubt(report):
    report["requests"] = report["requests"][:3]
    report["planned"], report["interrupted"], report["mode_problems"] = 3, False, {}
    report["mode_samples"] = [sample(0.1, 5, 1), sample(1.0, 5, 1), sample(9.9, 25, 4)]  # idle in between
    report["summary"] = reports.summarize(report)
    assert reports.warnings(report) == []


@pytest.mark.parametrize("blocks", ["null", "5", '"ab"', '""', "{}", "[-1]", "[1.0]"])
def test_blocks_are_a_list_of_ids(tmp_path, blocks):
    path = written(tmp_path, f'{{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": {blocks}}}')
    with pytest.raises(TraceError, match="hash_ids must be a list of whole numbers"):
        read_trace(path)


def test_the_first_block_is_0(tmp_path):
    path = written(tmp_path, '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [0, 1]}')
    assert read_trace(path)[1][0].blocks == (0, 1)


def test_times_without_a_zone_have_no_summer(tmp_path, monkeypatch):
    times = "2024-03-31 01:30:00,5,5\n2024-03-31 03:30:00,5,5\n"
    path = written(tmp_path, f"TIMESTAMP,ContextTokens,GeneratedTokens\n{times}")
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        first, second = read_trace(path)[1]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert second.arrival - first.arrival == 7200


def test_samples_have_the_time_of_the_replay(server):
    found = run(server, [TraceRequest(0.02 * number, 5, 1) for number in range(10)])
    times = [each.time for each in found.samples]
    assert times == sorted(times)
    assert 0 < times[0] <= times[-1] <= found.seconds + 1


def test_a_page_that_fails_is_named(server):
    server.damage = lambda text: 1 / 0
    found = run(server, [TraceRequest(0, 1, 1)])
    (problem,) = found.sample_problems
    assert "ClientResponseError 500" in problem


def test_other_metrics_are_left_alone():
    page = FakeServer()
    text = asyncio.run(page.page(None)).text
    odd = 'other_metric{ broken\nvllm:other_total{mode="tp"} 5\nvllm:shift_x_bucket{le="oops} 1\n'
    assert parse(odd + text, 1.0) == parse(text, 1.0)


def test_one_sample_is_no_difference(report):
    report["mode_samples"] = [sample(0.1, 5, 1)]
    assert reports.summarize(report)["modes"] is None


def test_problems_are_counted():
    async def two():
        async with aiohttp.ClientSession() as http:
            sampler = ModeSampler(http, "http://127.0.0.1:9", 1.0)
            await sampler.sample(0.0)
            await sampler.sample(0.0)
        return sampler.problems

    assert list(asyncio.run(two()).values()) == [2]


def test_a_restart_is_seen_in_either_mode(report):
    report["mode_samples"] = [sample(0.1, 5, 20), sample(5.0, 6, 1)]
    report["summary"] = reports.summarize(report)
    assert "it has restarted" in "\n".join(reports.warnings(report))


def test_the_most_frequent_failure_comes_first(report):
    for request, error in zip(report["requests"][-3:], ("HTTP 500", "stalled", "stalled"), strict=True):
        request["error"] = error
    assert reports.summarize(report)["failures"] == [
        {"reason": "stalled", "count": 2},
        {"reason": "HTTP 500", "count": 1},
    ]


def test_the_summary_is_that_of_the_requests(report, tmp_path):
    reports.save(report | {"summary": {}}, tmp_path / "report.json")
    assert reports.load(tmp_path / "report.json")["summary"] == report["summary"]


def test_bytes_that_are_no_text_are_a_bad_line_and_a_mark_at_the_begin_is_none(tmp_path):
    path = tmp_path / "trace"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b'{"arrival_s": \xff}\n')
    with pytest.raises(TraceError, match="1 bad line; nothing has been sent\n  line 2: not JSON"):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot read"), ("nonsense", "is not JSON"), ("[]", "its format is None, not")]
)
def test_what_is_no_report_is_named(tmp_path, text, message):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CommandError, match=message):
        reports.load(path)


def test_a_folder_is_no_place_for_a_trace(tmp_path):
    with pytest.raises(CommandError, match="cannot write"):
        write_trace(tmp_path, [TraceRequest(0.0, 1, 1)])
