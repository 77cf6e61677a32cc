"""The command line as a user meets it: output, errors in one line, exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from engine import Engine, EngineConfig, SamplingParams
from engine.__main__ import main, make_parser
from engine.bench.info import advice
from engine.cli.options import read_overrides
from engine.cli.terminal import Bars, error_console
from engine.data import tiny_model_path
from engine.models import load_model
from engine.synthetic import open_model_file

REPO = Path(__file__).resolve().parent.parent
SMALL = ["-c", "128", "-t", "1", "--set", "engine.max_batch_tokens=32"]
ENDLESS = ["-n", "30000", "-c", "30100", "--set", "sampling.ignore_eos=true"]  # far longer than a test looks
GREEDY = ["--temperature", "0", "-n", "8", *SMALL]


def command(*args: str, stdin: str | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "engine", *args],
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def expected() -> str:
    """What the bundled model says to the prompt of these tests."""
    settings = EngineConfig.load(overrides={"engine.context_length": 128, "engine.n_threads": 1})
    with Engine.open(config=settings) as engine:
        return engine.generate("def main():", SamplingParams(temperature=0.0, max_tokens=8)).text


# -- run -------------------------------------------------------------------------------------------------------------


def test_run_prints_text_alone_on_standard_output(expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-p", "def main():", *GREEDY]) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    first, last = err.splitlines()
    assert first.startswith("tiny-moe (qwen35moe)")
    assert re.fullmatch(r"prompt 4 tokens, .* tok/s; answer 8 tokens, .* tok/s; ended by length; seed \d+", last)


def test_quiet_run_prints_nothing_else(expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tiny_model_path()), "-q", "--echo", "-p", "def main():", *GREEDY]) == 0
    assert capsys.readouterr() == (f"def main():{expected}\n", "")


def test_prompt_from_standard_input(
    expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def main():"))
    assert main(["run", "-q", "-p", "-", *GREEDY]) == 0
    assert capsys.readouterr().out == expected + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["run", "-q", "-p", "-", *GREEDY]) == 1
    assert capsys.readouterr().err == "error: standard input is empty; give a prompt\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", "surrogateescape"))
    assert main(["run", "-q", "-p", "-", *GREEDY]) == 1
    assert capsys.readouterr().err == "error: standard input is not utf-8 text; convert it, with iconv for example\n"


def test_options_that_can_be_repeated_become_one_setting_each() -> None:
    options = ["--stop", r"a\n", "--stop", r"\tb", "--chat-variable", "x=1", "--chat-variable", "y=2"]
    for command in (["run", "-p", "x"], ["chat", "model.gguf"], ["batch", "job.toml"]):
        overrides = read_overrides(make_parser().parse_args([*command, *options]))
        assert overrides["sampling.stop"] == ("a\n", "\tb")
        assert overrides["model.chat_variables"] == ("x=1", "y=2")
        assert "sampling.stop" not in read_overrides(make_parser().parse_args(command))


def test_stop_and_special(expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    stop = expected[4:6]
    assert main(["run", "-q", "-p", "def main():", "--stop", stop, *GREEDY]) == 0
    assert capsys.readouterr().out == expected[: expected.index(stop)] + "\n"
    assert main(["run", "-p", "a<|endoftext|>b", "--special", *GREEDY]) == 0
    assert "prompt 3 tokens" in capsys.readouterr().err
    assert main(["run", "-p", "a<|endoftext|>b", *GREEDY]) == 0
    assert "prompt 3 tokens" not in capsys.readouterr().err


def test_run_in_chat_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-p", "x", "--chat", *GREEDY]) == 0
    n_tokens = re.search(r"prompt (\d+) tokens", capsys.readouterr().err)
    assert n_tokens is not None
    assert int(n_tokens[1]) > 5  # the markup around it


def test_the_chat_template_can_be_told_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ effort }}{% if thinks %} hmm{% endif %}{{ 'a' * n }}{{ messages[0].content }}")
    options = ["--chat", "--chat-template", str(template), "--chat-variable", "effort=low", "--chat-variable", "n=3"]
    lengths = []
    for more in ("thinks=true", "thinks=false"):
        assert main(["run", "-p", "x", *options, "--chat-variable", more, *GREEDY]) == 0
        lengths.append(int(re.search(r"prompt (\d+) tokens", capsys.readouterr().err)[1]))
    with Engine.open(config=EngineConfig.load(environ={}, overrides={"engine.n_threads": 1})) as engine:
        assert lengths == [len(engine.tokenize(text)) for text in ("low hmmaaax", "lowaaax")]
    assert main(["run", "-q", "-p", "x", "--chat", "--chat-variable", "thinks"]) == 2
    assert "model.chat_variables has 'thinks'; expected NAME=VALUE such as" in capsys.readouterr().err
    assert main(["run", "-q", "-p", "x", "--chat", "--chat-variable", "tools=1"]) == 2
    assert "model.chat_variables has 'tools', which is what the engine tells" in capsys.readouterr().err


def test_settings_from_file_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[sampling]\nmax_tokens = 2\ntemperature = 0\n[engine]\ncontext_length = 100\n")
    assert main(["run", "-p", "x", "--config", str(file)]) == 0
    err = capsys.readouterr().err
    assert "context 100" in err
    assert "answer 2 tokens" in err
    assert main(["run", "-p", "x", "--config", str(file), "-n", "3", "--set", "engine.context_length = 90"]) == 0
    err = capsys.readouterr().err
    assert "context 90" in err
    assert "answer 3 tokens" in err


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["run", "-p", "x", "-t", "-3"], 2, "error: engine.n_threads is '-3'"),
        (["run", "-p", "x", "--set", "engine.threads=1"], 2, "unknown key engine.threads; did you mean n_threads?"),
        (["run", "-p", "x", "--set", "engine=1"], 2, 'setting engine: is a table; expected "engine.key"; the keys are'),
        (["run", "-p", "x", "-t", "1", "--vram-budget", "12"], 2, "error: engine.vram_budget is '12'; expected a size"),
        (["plan", "--machine", "4090", "--vram", "24"], 2, "error: --vram is '24'; expected a size above 0 such as"),
        (["plan", "--machine", "4090", "--pcie", "0"], 2, "error: --pcie is '0'; expected a bandwidth above 0 such as"),
        (
            ["bench", "--watch", "--csv", "x.csv"],
            1,
            "--peer and --csv do not go with --conversation, --watch or --drafts",
        ),
        (["bench", "--replay", "x", "--peer", "llama.cpp"], 1, "--peer does not go with --replay"),
        (["run", "-p", "x", "--set", "nonsense"], 2, "--set nonsense: expected TABLE.KEY=VALUE"),
        (["run", "-p", "x", "--top-p", "7"], 2, "sampling.top_p is '7'; expected a number from 0 to 1"),
        (["run", "-p", "x", "--config", "nothing.toml"], 2, "nothing.toml: cannot be read"),
        (["run", "-p", "x", "--device", "cpu", "--hot-k", "44"], 2, "moe.hot_k is 44 and engine.device is 'cpu'"),
        (["run", "nothing.gguf", "-p", "x"], 1, "nothing.gguf"),
        (["run", str(REPO / "setup.py"), "-p", "x"], 1, "setup.py"),
        (["run", "synthetic:nothing", "-p", "x"], 2, "nothing"),
        (["run", "-p", "", *SMALL], 1, "the prompt is empty"),
        (["run", "-p", "x " * 500, *SMALL], 1, "the context holds 128"),
        (["run", "-p", "x", "--device", "cuda"], 1, "engine.device is 'cuda'"),
        (["info", "nothing.gguf"], 1, "No such file or directory; give the path of a .gguf file"),
        (["info", str(tiny_model_path())[:-6] + ".gguf"], 1, f"; did you mean {tiny_model_path()}?"),
        (["run", "", "-p", "x"], 2, "the name of the model is empty; give a file"),
        (["run", "-p", "x", "--record-trace", "/nowhere/t.npz"], 2, "there is no folder /nowhere; make it first"),
        (["run", "-p", "x", "--expert-profile", "/dev/full"], 2, "moe.profile is '/dev/full', which cannot be written"),
        (["bench", "--json", "/nowhere/x.json"], 2, "/nowhere/x.json: cannot be written: there is no folder /nowhere"),
        (["synth", "tiny", "/dev/full", "--force"], 1, "/dev/full: cannot be written: is there and is no file"),
        (["plan"], 2, "--vram, --ram, --ram-bandwidth, --pcie, --vram-bandwidth: missing; give the machine's figures"),
        (
            ["plan", "--machine", "4090", "--cache-policy", "mru"],
            2,
            "there is no cache policy 'mru'; there are adaptive",
        ),
        (["run", "-p", "x", "--set", "engine.n_sequences=0"], 2, "expected an integer from 1 to 1024"),
        (["batch", "nothing.toml"], 2, "nothing.toml: cannot be read"),
        (["chat", str(tiny_model_path()), "--chat-template", "nothing.jinja"], 2, "nothing.jinja"),
        (["chat", str(tiny_model_path()), "--resume", "nothing.json"], 1, "nothing.json: cannot be read"),
        (["synth", "nothing", "out.gguf"], 2, "nothing"),
        (["config", "--kv-type", "q9"], 2, 'engine.kv_type is \'q9\'; expected one of "f32", "f16", "q8_0"'),
    ],
)
def test_an_error_is_one_line_and_a_code(
    argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argv[0], "-q", *argv[1:]]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; get the file again"),
        (tiny_model_path().read_bytes()[:20], "is damaged or an incomplete download; get it again"),
        (tiny_model_path().read_bytes()[:100_000], "is damaged or an incomplete download; get it again"),
        (tiny_model_path().read_bytes()[:-5000], "it is probably an incomplete download; get it again"),
        (b"\x80\x00\x00\x00\x00\x00\x00\x00{}", "convert_hf_to_gguf.py"),
        (b"<!DOCTYPE html><html>", "the download link led to a page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GGML and so on, of old", "give a model in the GGUF format"),
        (
            tiny_model_path().read_bytes().replace(b"\x09\0\0\0\0\0\0\0qwen35moe", b"\x09\0\0\0\0\0\0\0something", 1),
            "'something' (general.architecture); this version runs afmoe, arctic",
        ),
    ],
    ids=["empty", "header", "keys", "weights", "safetensors", "page", "pointer", "old", "architecture"],
)
def test_files_that_are_no_models_say_what_to_do(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.gguf"
    path.write_bytes(content)
    assert main(["run", "-q", str(path), "-p", "x"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert "some.gguf" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["run"], "-p/--prompt"),
        (["run", "-p"], "expected one argument"),
        (["run", "-p", "x", "--nothing"], "--nothing"),
        (["chat"], "model"),
        (["synth", "tiny"], "OUT.gguf"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "--help" in err


def test_debug_shows_where_an_error_comes_from() -> None:
    process = command("run", "nothing.gguf", "-p", "x", "--debug")
    assert "Traceback" in process.communicate(timeout=60)[1]
    assert process.returncode == 1


@pytest.mark.parametrize(
    "argv", [[], ["run"], ["chat"], ["batch"], ["bench"], ["info"], ["synth"], ["config"], ["completion"]]
)
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage: python -m engine" in out
    assert argv or all(name in out for name in ("run", "chat", "bench", "info", "synth", "config", "examples:"))


# -- signals and pipes -----------------------------------------------------------------------------------------------


def test_ctrl_c_ends_with_its_code_and_no_traceback() -> None:
    process = command("run", "-p", "def main():", *ENDLESS)
    assert process.stdout is not None
    assert process.stdout.read(1)  # it is writing
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "error" not in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = command("run", "-q", "-p", "def main():", "-n", "900", "--set", "sampling.ignore_eos=true")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_output_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["config"], ["run", "-q", "-p", "x", "-n", "3", *SMALL], ["info", "--device", "cpu"]):
        with open("/dev/full", "w") as full:  # noqa: PTH123
            line = [sys.executable, "-m", "engine", *argv]
            done = subprocess.run(line, check=False, cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "error: the system gave no more memory; close other programs, or lower"),
        (PermissionError(13, "Permission denied", "a/b"), "error: a/b: Permission denied"),
    ],
)
def test_what_the_system_says_is_one_line(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Engine, "open", fail)
    assert main(["run", "-q", "-p", "x"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_a_terminal_that_lacks_a_character_shows_its_number() -> None:
    line = [sys.executable, "-m", "engine", "run", "-q", "--echo", "-p", "é\u2192", "-n", "1", *SMALL]
    done = subprocess.run(
        line, check=True, cwd=REPO, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True
    )
    assert done.stdout.startswith(b"\xe9\\u2192")
    assert done.stderr == b""


def test_a_model_that_is_cut_short_while_it_is_used_is_named(tmp_path: Path) -> None:
    """Its pages are gone in the middle of a product, where no exception can be raised."""
    model = tmp_path / "some model.gguf"
    shutil.copyfile(tiny_model_path(), model)
    script = f"""
import os, sys
from engine import Engine
from engine.__main__ import main

open_whole = Engine.open

def open_and_cut(*args, **settings):
    engine = open_whole(*args, **settings)
    os.truncate({str(model)!r}, 4096)
    return engine

Engine.open = staticmethod(open_and_cut)
sys.exit(main(["run", {str(model)!r}, "--load", "mmap", "-p", "x", *{GREEDY!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"error: {model}: cannot be read any more: it was cut short" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("hot-experts ")


# -- the small commands ----------------------------------------------------------------------------------------------


def info(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main(["info", "--json", *args]) == 0
    return json.loads(capsys.readouterr().out)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    facts = info(capsys, str(tiny_model_path()), "--device", "cpu")
    assert facts["architecture"] == "qwen35moe"
    assert facts["parameters"] == 27_159_328
    assert facts["experts"] == 56
    assert 0 < facts["bytes_a_token_reads"] < facts["weight_bytes"]
    assert facts["needed_bytes"] > facts["weights_in_RAM_bytes"]
    assert facts["decode_tok_s_at_most"] > facts["decode_tok_s_at_most_in_full_context"] > 0
    for part in ("27,159,328", "on this machine", "a token takes at least", 'none is used: engine.device is "cpu"'):
        assert part in shown


def test_info_places_experts_on_the_gpu_as_plan_does(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = ("--device", "emulated", "--vram-budget", "15.5MB", "-c", "512")
    assert main(["info", *gpu]) == 0
    shown = capsys.readouterr().out
    facts = info(capsys, *gpu)
    assert facts["VRAM_planned_bytes"] <= facts["VRAM_free_bytes"] == 15_500_000
    assert re.match(r"\d+( to \d+)? of 56", facts["expert_slots_of_a_layer"])
    assert 0 < facts["share_of_experts_in_VRAM"] < facts["share_of_reads_from_VRAM_expected"] < 1
    assert facts["read_bandwidth_GB_s"] == 60
    args = ["--ram", "1GB", "--vram", "15.5MB", "--ram-bandwidth", "60GB/s", "--pcie", "25GB/s"]
    assert main(["plan", "--json", *args, "--vram-bandwidth", "900GB/s", "-c", "512"]) == 0
    hot = json.loads(capsys.readouterr().out)[2]
    assert facts["decode_tok_s_expected"] == pytest.approx(hot["decode_tok_s"], rel=1e-9)
    assert facts["VRAM_planned_bytes"] == hot["vram_bytes"]
    assert f"about {hot['decode_tok_s']:,.1f} tok/s at half of the context" in shown
    assert "whole layers" in shown
    for setting, resident in (("--hot-k=4", 4 / 56), ("--n-cpu-moe=7", 1 / 8), ("--hot-k=0", 0)):
        assert info(capsys, *gpu, setting)["share_of_experts_in_VRAM"] == pytest.approx(resident, rel=0.05)
    assert "needs" in info(capsys, "--device", "emulated", "--vram-budget", "1MB")["problem"]


def test_info_of_a_dense_model(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    path = str(data / "peers" / "qwen3-F32.gguf")
    assert info(capsys, path, "--device", "cpu")["experts"] == 0
    facts = info(capsys, path, "--device", "emulated")
    assert facts["decode_tok_s_expected"] > 0
    assert "expert_slots_of_a_layer" not in facts
    assert main(["info", path, "--device", "emulated"]) == 0
    assert "It fits the VRAM." in capsys.readouterr().out


def test_info_says_what_does_not_fit() -> None:
    here = {"RAM_bytes": 10**9, "RAM_free_bytes": 10**9, "needed_bytes": 2 * 10**9, "decode_tok_s_at_most": 4.0}
    text = " ".join(advice(here, "mmap"))
    assert "at least 250.00 ms" in text
    assert "does not fit the RAM: 2 GB of 1 GB. The rest is read from the disk" in text
    assert "take fewer layers" in advice(here, "mmap", is_synthetic=True)[0]
    assert advice(here | {"RAM_bytes": 0, "RAM_free_bytes": 0}, "memory")[0] == "It fits the RAM."
    assert "but not the 1 GB that are free now" in advice(here | {"RAM_bytes": 3 * 10**9}, "mmap")[0]


def test_synth_writes_a_model_that_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.gguf"
    assert main(["synth", "tiny:layers=2", str(path)]) == 0
    assert f"wrote {path}" in capsys.readouterr().err
    model_file = open_model_file(path)
    assert load_model(model_file).spec.n_layers == 2
    model_file.close()
    assert main(["synth", "tiny:layers=2", str(path)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["synth", "synthetic:tiny:layers=1", str(path), "--force"]) == 0
    assert load_model(open_model_file(path)).spec.n_layers == 1


def test_config_prints_a_file_that_means_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "-t", "3", "--set", "sampling.stop=['a']"]) == 0
    path = tmp_path / "printed.toml"
    path.write_text(capsys.readouterr().out)
    settings = EngineConfig.load(path, environ={})
    assert settings.engine.n_threads == 3
    assert settings.sampling.stop == ("a",)


def test_chat_talks_in_turns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runtime.prompts.ChatTemplate", PlainTemplate)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\nsecond\n/reset\nthird\n/exit\nnever\n"))
    PlainTemplate.seen.clear()
    assert main(["chat", str(tiny_model_path()), "--system", "be short", *GREEDY]) == 0
    out, err = capsys.readouterr()
    contents = [[message["content"] for message in messages] for messages in PlainTemplate.seen[1:]]
    assert contents[0] == ["be short", "first"]
    assert contents[1][:2] == ["be short", "first"]
    assert contents[1][3] == "second"
    assert contents[1][2] in out
    assert contents[2] == ["be short", "third"]
    assert len(contents) == 3
    assert err.count("tok/s") == 6
    assert "/help lists commands" in err


def chat(lines: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[list[dict]]:
    """Run a chat with a model that has a plain template; return the messages of each answer."""
    monkeypatch.setattr("engine.runtime.prompts.ChatTemplate", PlainTemplate)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    PlainTemplate.seen.clear()
    assert main(["chat", str(tiny_model_path()), *options, *GREEDY]) == 0
    return PlainTemplate.seen[1:]


def test_chat_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "talk.json"
    (tmp_path / "notes.txt").write_text("mine")
    commands = (f"/save {tmp_path}/notes.txt", "/stats", f"/save {file}", "/save", f"/save {tmp_path}", "/nothing")
    lines = "\n".join(["first", *commands, "/help", "/system be long", "second", ""])
    seen = chat(lines, monkeypatch, "--system", "be short")
    err = capsys.readouterr().err
    for part in ("1 answers; prompts", "saved 3 messages", "/save needs", "cannot be written", "no command /nothing"):
        assert part in err
    assert "begin anew" in err
    assert "notes.txt: is not a conversation that /save wrote; give another name" in err
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [message["content"] for message in seen[-1]] == ["be long", "second"]
    seen = chat("third\n", monkeypatch, "--resume", str(file))
    assert [message["content"] for message in seen[0]][:2] == ["be short", "first"]
    assert seen[0][3]["content"] == "third"
    for content in ("", "{}", "[1]", '[{"role": "user"}]'):
        file.write_text(content)
        assert main(["chat", str(tiny_model_path()), "--resume", str(file)]) == 1
        assert "is not a conversation" in capsys.readouterr().err


def test_a_system_message_that_is_no_text_changes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that the chat template refuses: both would be said of every message that follows."""
    seen = chat("first\n/system caf\udce9\nsecond\n", monkeypatch, "--system", "be short")
    assert "a lone surrogate" in (err := capsys.readouterr().err)
    assert err.count("the conversation goes on as it was") == 1
    system, first, _, second = (message["content"] for message in seen[-1])
    assert (system, first, second) == ("be short", "first", "second")


def test_chat_entries_of_several_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = chat('one\\\ntwo\n"""\nthree\n\n  four"""\n"""five\n"""\nsix\\\n', monkeypatch)
    assert [messages[-1]["content"] for messages in seen] == ["one\ntwo", "three\n\n  four", "five", "six"]


def test_a_message_that_cannot_be_answered_does_not_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = chat("x " * 500 + "\nshort\n", monkeypatch)
    assert "/reset begins anew" in capsys.readouterr().err
    assert [message["content"] for message in seen[1]] == ["short"]


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def interrupted(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("engine.cli.chat.write", interrupted)
    seen = chat("first\nsecond\n", monkeypatch)
    assert len(seen) == 2
    assert [message["role"] for message in seen[1]] == ["user", "assistant", "user"]
    assert seen[1][1]["content"] == "".join(written[:3])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    if shell == "zsh":
        assert script.startswith("autoload")
        return
    if shell == "fish":
        start = "complete -c hot-experts -n '__fish_seen_subcommand_from"
        assert f"{start} run' -l kv-type -x -a 'f32 f16 q8_0'\n" in script  # choices
        assert f"{start} run' -s p -l prompt -r\n" in script  # some value
        assert f"{start} run' -l chat\n" in script  # none
        assert f"{start} completion' -x -a 'bash zsh fish'\n" in script
        return
    path = tmp_path / "complete.sh"
    path.write_text(
        script
        + 'complete_line() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _hot_experts; echo "${COMPREPLY[*]}"; }\n'
    )

    def complete(*words: str) -> list[str]:
        line = ["bash", "-c", f'. {path}; complete_line "$@"', "-", "hot-experts", *words]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()

    assert complete("ba") == ["batch"]
    assert complete("run", "--temp") == ["--temperature"]
    assert complete("run", "--kv-type", "") == ["f32", "f16", "q8_0"]
    assert complete("completion", "") == ["bash", "zsh", "fish"]
    assert complete("run", "mod") == []


class PlainTemplate:
    """A chat template for a model that has none: the messages, a line each."""

    seen: ClassVar[list] = []

    @classmethod
    def from_metadata(cls, metadata, tokenizer) -> PlainTemplate:
        return cls()

    def render(self, messages, **variables) -> str:
        self.seen.append([dict(message) for message in messages])
        return "\n".join([*(message["content"] for message in messages), *map(str, variables.items())])


def test_bars_are_for_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars(error_console()) as bars:
        bars.loading("loading", 1, 10)
        bars.prompt(100, 1000)
    assert capsys.readouterr().err == ""
