"""The bench: its report, its files, its other modes. What the figures are is for people to judge."""

from __future__ import annotations

import csv
import importlib
import io
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench import batch
from engine.bench.__main__ import main
from engine.bench.conversation import Turn
from engine.bench.kernels import DecodeSpeed, KernelSpeed
from engine.bench.measure import Placed, Row, Sample, Spread, random_tokens, summarise
from engine.bench.peers import import_llama_cpp, measure_llama_cpp
from engine.bench.plots import plot_conversation, plot_speeds
from engine.bench.table import Report, render, to_csv, to_json, write_file
from engine.cli.layers import layer_table
from engine.data import tiny_model_path
from engine.devices.timing import StepTime
from engine.devices.traffic import count_weights
from engine.errors import RequestError
from engine.experts.hot_cache import CacheStatistics
from engine.models import load_model
from engine.runtime import Engine, EngineStatistics
from engine.synthetic import open_model_file

QUICK = ["-q", "-t", "1", "--gen-tokens", "2", "--reps", "2", "--set", "bench.bandwidth_mb=16"]
ROWS = [
    Row(
        "all on CPU",
        128,
        64,
        Spread(100.0, 90.0, 110.0),
        Spread(1.25, 1.2, 1.3),
        Spread(10.0, 9.0, 11.0),
        10**9,
        10**9,
        Spread(20e9, 18e9, 21e9),
    ),
    Row(
        "a peer",
        128,
        64,
        Spread(50.0, 50.0, 50.0),
        Spread(2.5, 2.5, 2.5),
        Spread(5.0, 5.0, 5.0),
        0,
        0,
        note="a note, quoted",
    ),
]
REPORT = Report({"machine": "a machine", "model": "a model"}, ROWS, ["mind this"])


def shown(report: Report) -> str:
    out = io.StringIO()
    render(report, Console(file=out, width=160, highlight=False, markup=False))
    return out.getvalue()


def test_figures_of_a_row() -> None:
    samples = [Sample(2.0, 2.5, 4.0), Sample(1.0, 1.5, 8.0), Sample(4.0, 4.5, 2.0)]
    row = summarise("x", samples, n_prompt=8, n_gen=16, token_bytes=1000)
    assert row.prompt_tok_s == Spread(4.0, 2.0, 8.0)
    assert row.first_token_s == Spread(2.5, 1.5, 4.5)
    assert row.decode_tok_s == Spread(4.0, 2.0, 8.0)
    assert row.bandwidth == 4000
    assert row.ram_bytes > 0


def test_the_table_shows_median_spread_and_share() -> None:
    text = shown(REPORT)
    for part in (
        "a machine",
        "RAM gave GB/s",
        "18-21",
        "all on CPU",
        "128 + 64",
        "90-110",
        "1250",
        "50%",
        "a note, quoted",
        "mind this",
    ):
        assert part.replace("1250", "1,250") in text
    # What no row can say has no column; nothing stands for it.
    bare = shown(Report({}, ROWS[1:]))
    assert "limit" not in bare.partition("tokens")[2]
    assert "GB/s" not in bare.partition("tokens")[2]
    assert "RAM GB" not in bare


def test_three_placements_fit_a_terminal_of_usual_width() -> None:
    placed = Placed(
        12_345_678_900, 0.66, 20.5, 45.6e9, 6.5e9, 345.6e9, 54.6, 61.2, 77.7, 0.86, 2.5e-3, 6e-3, 5e-4, is_virtual=True
    )
    names = ("all experts on the CPU", "whole layers (n_cpu_moe = 39)", "hot experts (window_topk)")
    rows = [replace(ROWS[0], name=name, placed=placed, gains={"CPU": 0.57, "layers": 0.3}) for name in names]
    out = io.StringIO()
    render(Report({}, rows), Console(file=out, width=80, highlight=False, markup=False))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "…" not in out.getvalue()
    wanted = (
        "steady 77.7",
        "GPU ms 2.5",
        "CPU ms 6",
        "other ms 0.5",
        "over layers +30%",
        "PCIe GB/s 6.5",
        "VRAM GB 12.3",
        "of limit 86%",
        "virtual clock",
    )
    assert all(any(line.startswith(start) for line in lines) for start in wanted)


def test_files_hold_every_figure(tmp_path: Path) -> None:
    data = json.loads(to_json(REPORT))
    assert data["rows"][0]["read_bandwidth"]["low"] == 18e9
    assert data["rows"][0]["decode_tok_s"] == {"median": 10.0, "low": 9.0, "high": 11.0}
    first, second = csv.DictReader(io.StringIO(to_csv(REPORT)))
    assert first["decode_tok_s_low"] == "9.0"
    assert first["machine"] == "a machine"
    assert first["read_bandwidth_high"] == "21000000000.0"
    assert second["note"] == "a note, quoted"
    assert second["read_bandwidth"] == ""

    path = tmp_path / "out.json"
    path.write_text("old")
    write_file(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(RequestError, match="cannot be written"):
        write_file(tmp_path / "nowhere" / "out.json", "x")
    path.with_name("folder").mkdir()
    with pytest.raises(RequestError, match="cannot be written"):
        write_file(tmp_path / "folder", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "out.json"]


def test_random_tokens_are_the_same_for_everybody() -> None:
    assert random_tokens(5, 100) == random_tokens(9, 100)[:5]
    assert all(0 <= token < 7 for token in random_tokens(100, 7))


def test_bench_of_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "o.json"), "--csv", str(tmp_path / "o.csv")]
    assert main([*QUICK, "--prompt-tokens", "4,9", *files]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for part in ("tiny-moe (qwen35moe)", "Q4_K", "1 thread", "4 + 2", "9 + 2", "commit"):
        assert part in out
    data = json.loads((tmp_path / "o.json").read_text())
    assert [row["n_prompt"] for row in data["rows"]] == [4, 9]
    model_file = open_model_file(tiny_model_path())
    assert data["rows"][0]["token_bytes"] == count_weights(load_model(model_file).graph).token_bytes
    for row in data["rows"]:
        for name in ("prompt_tok_s", "first_token_s", "decode_tok_s", "read_bandwidth"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 3


PLACED = [*QUICK, "--device", "emulated", "--prompt-tokens", "40", "--gen-tokens", "20"]


def test_three_placements_at_equal_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "o.json"), "--csv", str(tmp_path / "o.csv")]
    assert main([*PLACED, "--vram-budget", "12MB", *files]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("all experts", "on the CPU", "whole layers", "hot experts", "virtual clock's"))
    assert "measured now" not in out
    cpu, layers, hot = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert cpu["placed"]["hit_rate"] == 0
    assert cpu["gains"] == {}
    assert 0 < layers["placed"]["hit_rate"] < hot["placed"]["hit_rate"] < 1
    assert hot["gains"]["CPU"] > layers["gains"]["CPU"] > 0
    assert hot["gains"]["layers"] > 0
    assert "over layers" in out
    assert "other ms" not in out
    assert hot["placed"]["swaps"] > 0
    assert layers["placed"]["vram_bytes"] <= hot["placed"]["vram_bytes"] <= 12_000_000
    for row in (cpu, layers, hot):
        placed = row["placed"]
        assert f"{placed['first_turn_tok_s']:,.0f}" in out
        assert min(placed["cold_tok_s"], placed["steady_tok_s"]) > 0
        assert placed["is_virtual"]
        assert 0 < placed["share_of_limit"] < 1
        assert placed["vram_bytes_s"] > 0
        assert placed["device_s"] == placed["cpu_s"] == placed["other_s"] == 0  # such a device does not measure it
    rows = list(csv.DictReader(io.StringIO((tmp_path / "o.csv").read_text())))
    assert float(rows[2]["hit_rate"]) == hot["placed"]["hit_rate"]


def test_no_more_text_is_made_than_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    generate = Engine.generate

    def watched(self: Engine, prompt: Any, params: Any = None, **others: Any) -> Any:
        answer = generate(self, prompt, params, **others)
        made.append(len(prompt) + len(answer.token_ids))
        return answer

    monkeypatch.setattr(Engine, "generate", watched)
    assert main([*PLACED, "--vram-budget", "20MB", "-c", "512"]) == 0
    assert made == [40, 40]


def test_a_model_of_random_weights_gets_routing_with_favourites(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLACED, "-m", "synthetic:tiny", "--hot-k", "6", "--reps", "1"]) == 0
    out = capsys.readouterr().out
    assert "made-up routing" in out
    assert "6 of 16 experts" in out


def test_a_conversation_shows_hits_turn_by_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "o.json")]
    assert main([*PLACED, "--conversation", "--hot-k", "8", "--gen-tokens", "12", *files]) == 0
    out = capsys.readouterr().out
    assert all(kind in out for kind in ("1 prose", "2 code", "3 German", "7 prose", "8 of 56 experts"))
    turns = json.loads((tmp_path / "o.json").read_text())
    assert [len(turn["hits"]) for turn in turns] == [11] * 7  # the first token of an answer comes out of the prompt
    assert turns[-1]["choices"] == [8 * 4] * 11
    assert turns[-1]["hits"][0] > 0  # the cache stays warm
    assert main([*QUICK, "--conversation"]) == 1
    assert "none is in use" in capsys.readouterr().err


def test_a_conversation_is_drawn(tmp_path: Path) -> None:
    hits, choices = np.arange(20), np.full(20, 32)
    turns = [Turn("code", 5, 10.0, hits, choices, 3), Turn("prose", 5, 10.0, hits[::-1], choices, 3)]
    plot_conversation(turns, "a model", tmp_path / "o.png")
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_the_live_view_shows_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLACED, "--watch", "--hot-k", "8", "--gen-tokens", "20"]) == 0
    out = capsys.readouterr().out
    assert "waiting for the CPU" in out
    assert "wait us" in out
    assert "(virtual clock)" in " ".join(out.split())


def test_layers_stand_side_by_side_where_a_terminal_is_low() -> None:
    def seen(n_tokens: int) -> EngineStatistics:
        counts = np.full(7, 4 * n_tokens)
        cache = CacheStatistics(n_tokens, counts // 2, counts, counts, 0, 0)
        times = StepTime(dense_s=1.0 * n_tokens, layers=np.full((3, 7), 1e-6 * n_tokens))
        return EngineStatistics("m", "d", None, 0, 0, 0, cache=cache, time_spent=times)

    def columns(max_rows: int) -> list[tuple[str, list[str]]]:
        table = layer_table("now", seen(12), seen(2), max_rows)
        return [(str(column.header), list(column.cells)) for column in table.columns]

    alone, beside = columns(7), columns(3)
    assert [name for name, _ in alone] == ["layer", "hits", "", "swaps", "device us", "CPU us", "wait us"]
    assert dict(alone)["layer"] == list("0123456")
    assert dict(alone)["hits"] == ["50%"] * 7
    assert dict(alone)["swaps"] == ["4.00"] * 7
    assert dict(alone)["wait us"] == ["1.0"] * 7
    assert [cells for name, cells in beside if name == "layer"] == [["0", "1", "2"], ["3", "4", "5"], ["6", "", ""]]
    assert len(beside) == 3 * 6  # without bars


def test_speeds_are_drawn(tmp_path: Path) -> None:
    for name, start in (("o.png", b"\x89PNG"), ("o.svg", b"<?xml"), ("o.pdf", b"%PDF")):
        plot_speeds(ROWS, "a model", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_what_cannot_be_drawn_is_said_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "open", None)
    assert main(["-q", "--plot", "x.xyz"]) == 2
    assert "--plot x.xyz: expected a name that ends in .png, .svg, .pdf" in capsys.readouterr().err
    assert main(["-q", "--plot", "x.png", "--profile"]) == 1
    assert "--plot do not go with --kernels or --profile" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["-q", "--plot", "x.png"]) == 2
    assert "plots need matplotlib; install it with: pip install matplotlib" in capsys.readouterr().err


def test_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--profile", "--prompt-tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert "prompt of 8 tokens" in out
    assert "one token" in out
    assert "experts" in out


def test_kernels_shows_every_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = DecodeSpeed(1, 1e9, 10e9), DecodeSpeed(2, 9e9, 12e9)
    speeds = [
        KernelSpeed("Q4_K", "scalar", (one, two), 3e9, is_fast=False),
        KernelSpeed("Q4_K", "avx2", (two, one), 5e9, is_fast=True),
    ]
    monkeypatch.setattr("engine.bench.kernels.measure_kernels", lambda formats, n_threads, n_bytes, progress: speeds)
    assert main([*QUICK, "--kernels"]) == 0
    out = capsys.readouterr().out
    slow = next(line for line in out.splitlines() if "scalar *" in line)
    assert all(figure in slow for figure in ("1.00 (10%)", "9.00 (75%)", "3.0"))
    assert "avx2 *" not in out
    assert "decode, 2 threads" in out


@pytest.mark.parametrize("long_step_s", [0.0, 60.0])
def test_one_kernel_is_really_timed(monkeypatch: pytest.MonkeyPatch, long_step_s: float) -> None:
    kernels = importlib.import_module("engine.bench.kernels")
    monkeypatch.setattr(kernels, "_LONG_STEP_S", long_step_s)
    monkeypatch.setattr(kernels, "HIDDEN_SIZE", 96)
    monkeypatch.setattr(kernels, "FFN_SIZE", 64)
    monkeypatch.setattr(kernels, "_SECONDS", 0.0)
    monkeypatch.setattr(kernels, "last_level_cache_bytes", lambda: 1 << 16)
    steps: list[tuple[str, int, int]] = []
    speeds = kernels.measure_kernels(kernels.named_formats("q8_0, F32"), 2, 1 << 20, lambda *step: steps.append(step))
    assert {speed.format for speed in speeds} == {"Q8_0", "F32"}
    assert all([decode.n_threads for decode in speed.decode] == [1, 2] for speed in speeds)
    assert all(decode.bytes_s > 0 and decode.bandwidth > 0 for speed in speeds for decode in speed.decode)
    assert all(speed.macs_s > 0 for speed in speeds)
    assert steps[-1][1] == steps[-1][2] == len(speeds)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--reps", "0"], 2, "bench.reps"),
        (["--prompt-tokens", "1,x"], 2, "bench.prompt_tokens"),
        (["--kernels", "--json", "x.json"], 1, "--json"),
        (["--kernels", "Q4_K,Q4_9"], 1, "there is no format 'Q4_9'; there are"),
        (["-m", "nothing.gguf"], 1, "nothing.gguf"),
        (["-m", "synthetic:tiny", "--peer", "llama.cpp"], 1, "python -m engine synth"),
        (["--prompt-tokens", "50", "-c", "40"], 1, "context"),
    ],
)
def test_errors(argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-q", *argv]) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


# -- the peer --------------------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    with pytest.raises(RequestError, match="pip install"):
        import_llama_cpp()
    assert main([*QUICK, "--peer", "llama.cpp"]) == 1
    assert "pip install" in capsys.readouterr().err


def test_a_peer_is_fed_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    api = fake_llama_cpp()
    package = types.ModuleType("llama_cpp")
    package.__version__ = "9.9"
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", api)
    rows = measure_llama_cpp(
        "file.gguf",
        prompt_lengths=[5, 3],
        n_gen=2,
        reps=2,
        n_threads=1,
        n_batch=4,
        token_bytes=77,
        buffer_bytes=1 << 20,
        progress=lambda *_: None,
    )
    assert [row.n_prompt for row in rows] == [5, 3]
    assert rows[0].note == "llama-cpp-python 9.9"
    assert rows[0].token_bytes == 77
    a, b = random_tokens(7, 50), random_tokens(5, 50)
    one_round = [a[:4], a[4:5], a[5:6], a[6:], b[:3], b[3:4], b[4:]]
    assert api.decoded[-14:] == one_round * 2
    assert api.freed == ["context", "model"]
    api.model_opens = False
    with pytest.raises(RequestError, match=r"cannot open file\.gguf"):
        measure_llama_cpp(
            "file.gguf",
            prompt_lengths=[5],
            n_gen=2,
            reps=1,
            n_threads=1,
            n_batch=4,
            token_bytes=0,
            buffer_bytes=1 << 20,
            progress=lambda *_: None,
        )


def fake_llama_cpp() -> types.ModuleType:
    """The part of llama-cpp-python's low-level module that is used."""
    api = types.ModuleType("llama_cpp.llama_cpp")
    api.decoded, api.freed, api.model_opens = [], [], True
    api.llama_token = importlib.import_module("ctypes").c_int32
    api.llama_log_callback = lambda function: function
    for name in ("llama_log_set", "llama_backend_init", "llama_memory_clear", "llama_get_logits_ith"):
        setattr(api, name, lambda *_: None)
    api.llama_model_default_params = api.llama_context_default_params = types.SimpleNamespace
    api.llama_model_load_from_file = lambda path, params: "model" if api.model_opens else None
    api.llama_init_from_model = lambda model, params: "context"
    api.llama_model_get_vocab = api.llama_get_memory = lambda owner: owner
    api.llama_vocab_n_tokens = lambda vocab: 50
    api.llama_batch_get_one = lambda tokens, n: list(tokens)[:n]
    api.llama_decode = lambda context, tokens: api.decoded.append(tokens) or 0
    api.llama_free = api.llama_model_free = api.freed.append
    return api


def test_answers_together_and_one_by_one_are_measured(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"model": tiny_model_path(), "threads": 1, "sequences": 2, "gen-tokens": 3, "rounds": 1}
    monkeypatch.setattr(sys, "argv", ["batch.py", *(f"--{name}={value}" for name, value in sizes.items())])
    batch.main()
    assert "round 1: one by one " in (shown := capsys.readouterr().out)
    assert "medians of 1 rounds: " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gen-tokens=0"], "--gen-tokens is 0; expected 1 or more"),
        (["--model=/nonexistent"], "/nonexistent: cannot be read"),
        (["--model=synthetic:tiny", "--sequences=5000"], "engine.n_sequences is 5000; expected an integer"),
    ],
)
def test_what_cannot_be_measured_is_a_message(
    arguments: list[str], message: str, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["batch.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        batch.main()
    assert stopped.value.code
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
