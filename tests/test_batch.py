"""Batch runs: what is read, what is refused before a model is opened, and that no kill loses or repeats an answer."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.__main__ import main
from engine.batch import ResultFile, load_job
from engine.cli.summaries import speed
from engine.errors import ConfigError, RequestError
from engine.runtime import Engine

REPO = Path(__file__).resolve().parent.parent
SETTINGS = """
[engine]
context_length = 64
n_threads = 1
max_batch_tokens = 32
[sampling]
max_tokens = 12
temperature = 0
ignore_eos = true
"""


def write_job(
    folder: Path, batch: str = 'input = ["in.jsonl"]\nprompt = "{q}"\nn_parallel = 3', rest: str = SETTINGS
) -> Path:
    path = folder / "job.toml"
    path.write_text(f"[batch]\n{batch}\n{rest}")
    return path


def write_items(folder: Path, n: int) -> None:
    lines = [json.dumps({"q": f"def f{i}(x):", "n": i}) for i in range(n)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def texts(folder: Path) -> dict[str, str]:
    found = results(folder)
    assert len({r["source"] for r in found}) == len(found)
    return {r["source"]: r["text"] for r in found}


# -- input -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_input(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": 2}\n')
    (tmp_path / "b.csv").write_text('\ufefftext,more\n"three, with\na line",x\nfour,y\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.txt").write_text("six\n")
    (tmp_path / "sub" / "c.txt").write_text("five")
    path = write_job(tmp_path, 'input = ["a.jsonl", "b.csv", "sub/*.txt"]\nprompt = "<{text}> {{x}}"')
    job = load_job(path)
    assert [(item.source, item.prompt) for item in job.items] == [
        ("a.jsonl:1", "<one> {x}"),
        ("a.jsonl:3", "<2> {x}"),
        ("b.csv:3", "<three, with\na line> {x}"),
        ("b.csv:4", "<four> {x}"),
        ("sub/c.txt", "<five> {x}"),
        ("sub/d.txt", "<six\n> {x}"),
    ]
    assert job.config.engine.n_sequences == 8
    assert job.output == tmp_path / "results.jsonl"
    lines = load_job(write_job(tmp_path, f'input = ["{tmp_path}/sub/*.txt"]\nformat = "lines"'))
    assert [item.prompt for item in lines.items] == ["five", "six"]


def test_file_names_are_relative_to_the_job(tmp_path: Path) -> None:
    write_items(tmp_path, 1)
    files = '[model]\npath = "m.gguf"\n[moe]\nrecord_trace = "/t.npz"\nprofile = "p.npz"\n'
    path = write_job(tmp_path, 'input = ["in.jsonl"]\nprompt = "{q}"', files)
    job = load_job(path, {"moe.profile": "mine.npz"})
    moe = job.config.moe
    assert job.config.model.path == str(tmp_path / "m.gguf")
    assert (moe.record_trace, moe.profile, job.config.model.chat_template) == ("/t.npz", "mine.npz", "")
    (tmp_path / "moved").mkdir()
    (tmp_path / "in.jsonl").rename(tmp_path / "moved" / "in.jsonl")
    moved = load_job(path.rename(tmp_path / "moved" / "job.toml"), {"model.path": "synthetic:tiny"})
    assert moved.config.model.path == "synthetic:tiny"
    assert moved.items[0].key != job.items[0].key
    assert load_job(tmp_path / "moved" / "job.toml").items[0].key == job.items[0].key  # it is the same job elsewhere


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ('[model]\npath = "nothing.gguf"', 1, "nothing.gguf: cannot be read"),
        ('[model]\nchat_template = "no.jinja"', 2, "model.chat_template is .*no.jinja', which cannot be read"),
        ('[moe]\nprofile = "in.jsonl"', 2, "in.jsonl: is not an expert profile"),
        ('[moe]\nrouting = "in.jsonl"', 2, "/in.jsonl: is not a routing trace"),
        ('[moe]\nrecord_trace = "no/t.npz"', 2, "moe.record_trace is .*no/t.npz', which cannot be written"),
    ],
)
def test_a_check_looks_at_the_model_and_all_files(
    tmp_path: Path, settings: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_items(tmp_path, 1)
    path = write_job(tmp_path, 'input = ["in.jsonl"]\nprompt = "{q}"', settings)
    assert main(["batch", "--check", str(path)]) == code
    assert re.search(message, capsys.readouterr().err)


def test_a_check_looks_at_the_output_and_leaves_it_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_items(tmp_path, 1)
    path = write_job(tmp_path)
    output = load_job(path).output
    assert main(["batch", "--check", str(path)]) == 0
    assert "1 items, nothing wrong" in capsys.readouterr().err
    assert not output.exists()
    for text, code in (
        ('{"source": "in.jsonl:1", "key": "another"}\n', 2),
        ('{"source": "in.jso', 0),
        ("a diary\n", 2),
    ):
        output.write_text(text)
        assert main(["batch", "--check", str(path)]) == code
        assert output.read_text() == text
    assert "line 1: is no result of a batch run" in capsys.readouterr().err


def test_a_check_reads_every_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_items(tmp_path, 3)
    long = write_job(tmp_path, 'input = ["in.jsonl"]\nprompt = "{q}"', "[engine]\ncontext_length = 2")
    (tmp_path / "in.jsonl").open("a").write('{"q": "x"}\n')
    assert main(["batch", "--check", str(long)]) == 3
    assert re.search(
        r"3 of 4 items cannot be answered:\nin.jsonl:1: the prompt has \d+ tokens", capsys.readouterr().err
    )
    (tmp_path / "chats.jsonl").write_text('{"m": [{"role": "user", "content": "hi"}]}\n')
    chats = 'input = ["chats.jsonl"]\nmessages_field = "m"'
    template = tmp_path / "t.jinja"
    keys = []
    for text, message in (
        ("{% for %}", "the model's chat template has an error in line 1"),
        ("{{ raise_exception('no') }}", "cannot render these messages: no"),
        ("{{ messages[0].content }}", ""),
    ):
        template.write_text(text)
        path = write_job(tmp_path, chats, '[model]\nchat_template = "t.jinja"')
        assert main(["batch", "--check", str(path)]) == (3 if message else 0)
        assert message in capsys.readouterr().err.replace("\n", " ")
        keys.append(load_job(path).items[0].key)
    assert len(set(keys)) == 3  # what was made with one template is no answer with another


def test_an_output_is_no_input_and_no_file_of_others(tmp_path: Path) -> None:
    text = '{"source": "web", "q": "what is this"}'  # without an end
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"'in.jsonl' is the job's own file, or its output"):
        load_job(write_job(tmp_path, 'input = ["in.jsonl"]\nprompt = "{q}"\noutput = "in.jsonl"'))
    job = load_job(write_job(tmp_path))
    for other in (text, '{"source": ["a"], "key": "x"}\n', "[" * 100_000 + "\n"):
        job.output.write_text(other)
        with pytest.raises(ConfigError, match="is no result of a batch run"):
            ResultFile(job.output, job.items)
        assert job.output.read_text() == other


def test_values_without_an_end_are_named(tmp_path: Path) -> None:
    path = write_job(tmp_path)
    for value in ("9" * 5000, "[" * 100_000):
        (tmp_path / "in.jsonl").write_text(f'{{"q": {value}}}\n')
        with pytest.raises(ConfigError, match=r"in.jsonl:1: cannot be read as JSON"):
            load_job(path)
    (tmp_path / "in.csv").write_text("q\n" + "x" * 200_000 + "\n")
    long = load_job(write_job(tmp_path, 'input = ["in.csv"]\nprompt = "{q}"'))
    assert len(long.items[0].prompt) == 200_000


def test_a_run_never_reads_its_own_files_nor_a_file_twice(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "results.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    job = load_job(write_job(tmp_path, f'input = ["b.jsonl", "*.jsonl", "{tmp_path}/a.jsonl", "*"]', ""))
    assert [item.source for item in job.items] == ["b.jsonl:1", "a.jsonl:1"]


def test_a_row_of_csv_ends_where_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,n\r\none\u2028two\x0cthree\x85,1\r\nfour,2\r\n".encode())
    job = load_job(write_job(tmp_path, 'input = ["a.csv"]'))
    assert [item.prompt for item in job.items] == ["one\u2028two\x0cthree\x85", "four"]


def test_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "talk": [{"role": "user", "content": "two"}]}\n')
    job = load_job(write_job(tmp_path, 'input = ["a.jsonl"]\nchat = true\nsystem = "Say {text}"'))
    assert job.items[0].prompt == [{"role": "system", "content": "Say one"}, {"role": "user", "content": "one"}]
    job = load_job(write_job(tmp_path, 'input = ["a.jsonl"]\nmessages_field = "talk"'))
    assert job.items[0].prompt == [{"role": "user", "content": "two"}]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("", r"batch.input names no file"),
        ('input = ["in.jsonl"]\nimput = 3', r"job.toml, line 3: unknown key batch.imput; did you mean input\?"),
        ('input = "in.jsonl"', r"job.toml, line 2: batch.input is 'in.jsonl'; expected a list"),
        ('input = ["in.jsonl"]\nn_parallel = 0', r"line 3: batch.n_parallel is 0; expected an integer from 1 to 1024"),
        ('input = ["in.jsonl"]\n[sampling]\ntop_k = "x"', r"job.toml, line 4: sampling.top_k is 'x'"),
        ('input = ["in.jsonl"]\nprompt = "{q"', r"batch.prompt: .*write \{\{ and \}\}"),
        ('input = ["in.jsonl"]\nprompt = "{} {q}"', r"batch.prompt: expected \{name\}"),
        ('input = ["in.jsonl"]\nprompt = "{q!r}"', r"batch.prompt: expected \{name\}"),
        ('input = ["in.jsonl"]\nsystem = "x"', r"batch.system is set and batch.chat is false"),
        ('input = ["in.jsonl"]\nmessages_field = "m"\nchat = true\nsystem = "x"', r"batch.messages_field replaces"),
        (
            'input = ["in.jsonl"]\nprompt = "{a}"',
            r"in.jsonl:1: there is no field 'a', which batch.prompt asks.*found q",
        ),
        ('input = ["in.jsonl"]\nmessages_field = "q"', r'in.jsonl:1: field "q" is no conversation'),
        (f'input = ["{"x" * 300}"]', r"batch.input: 'x+' cannot be read: File name too long"),
        ('input = ["folder/"]', r"batch.input: 'folder/' is a folder; write 'folder/\*' for the files in it"),
        ('input = ["fold*"]', r"no file matches 'fold\*' in "),
        ('input = ["*.md"]', r"no file matches '\*.md' in "),
        ('input = ["bad.jsonl"]\nprompt = "{q}"', r"bad.jsonl:2: is not JSON: .*column 1"),
        ('input = ["list.jsonl"]', r"list.jsonl:1: expected an object"),
        ('input = ["twice.csv"]', r"twice.csv:1: the header names 'a' twice"),
        ('input = ["in.jsonl"]\n[engine]\nn_sequences = 3', r"n_sequences is 3 and batch.n_parallel is 8, which"),
        ('input = ["bad.csv"]', r"bad.csv:2: has not as many values as the header has names"),
        ('input = ["latin.txt"]', r"latin.txt: is not UTF-8 text \(byte 1\)"),
        ('input = ["empty.jsonl"]', r"hold no items"),
        ('input = ["in.jsonl"]\nprompt = "{q}"\noutput = "no/where.jsonl"', r"batch.output: .*where.jsonl: cannot be"),
        (
            'input = ["in.jsonl"]\nprompt = "{q}"\noutput = "in.jsonl"',
            r"'in.jsonl' is the job's own file, or its output",
        ),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_opened(
    tmp_path: Path, batch: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_items(tmp_path, 2)
    (tmp_path / "bad.jsonl").write_text('{"q": 1}\nnonsense\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bad.csv").write_text("a,b\n1\n")
    (tmp_path / "twice.csv").write_text("b,a,a\n1,2,3\n")
    (tmp_path / "latin.txt").write_bytes(b"a\xe4")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(Engine, "open", None)
    path = write_job(tmp_path, batch, "")
    assert main(["batch", "-q", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert re.search(message, err)
    assert err.count("\n") == 1


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_and_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_items(tmp_path, 5)
    (tmp_path / "in.jsonl").open("a").write(json.dumps({"q": "too long " * 100}) + "\n" + json.dumps({"q": ""}) + "\n")
    path = write_job(tmp_path)
    assert main(["batch", str(path), "--check"]) == 3
    assert "2 of 7 items cannot be answered" in capsys.readouterr().err
    assert main(["batch", str(path), "--set", "sampling.logprobs=1"]) == 3
    err = capsys.readouterr().err
    assert "7 of 7 items done (2 failed), 0 of them before" in err
    assert f'2 items failed; what was wrong stands under "error" in {tmp_path}/results.jsonl; once' in err
    assert "in.jsonl:6: the prompt has" in err
    found = {result["source"]: result for result in results(tmp_path)}
    assert len(found) == 7
    assert found["in.jsonl:6"]["kind"] == "RequestError"
    assert "raise [engine] context_length" in found["in.jsonl:6"]["error"]
    assert "empty" in found["in.jsonl:7"]["error"]
    with Engine.open(config=load_job(path).config) as engine:
        for i in range(5):
            expected, result = engine.generate(f"def f{i}(x):"), found[f"in.jsonl:{i + 1}"]
            assert result["text"] == expected.text
            assert result["finish_reason"] == "length"
            assert result["usage"]["n_generated_tokens"] == 12
            assert result["timings"]["decode_s"] > 0
            assert [token["token_id"] for token in result["logprobs"]] == list(expected.token_ids)
            assert len(result["logprobs"][0]["top"]) == 1
        assert "tok/s" in speed(engine.statistics)
    size = (tmp_path / "results.jsonl").stat().st_size
    assert main(["batch", str(path), "--set", "sampling.logprobs=1"]) == 3  # nothing left to do
    assert "7 of 7 items done (2 failed), 7 of them before" in capsys.readouterr().err
    assert (tmp_path / "results.jsonl").stat().st_size == size


def test_items_that_failed_are_run_again_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_items(tmp_path, 3)
    (tmp_path / "in.jsonl").open("a").write(json.dumps({"q": "too long " * 50}) + "\n")
    path = write_job(tmp_path)
    assert main(["batch", "-q", str(path)]) == 3
    assert "1 item failed" in capsys.readouterr().err
    before = results(tmp_path)
    (tmp_path / "results.jsonl.new").write_text("left by a run that was killed")
    assert main(["batch", "-q", str(path), "--retry-failed"]) == 3  # nothing has changed
    assert sorted(results(tmp_path), key=lambda r: r["source"]) == sorted(before, key=lambda r: r["source"])
    assert main(["batch", "-q", str(path), "-c", "128"]) == 3  # not without being asked to
    assert main(["batch", "-q", str(path), "-c", "128", "--retry-failed"]) == 0
    after = {result["source"]: result for result in results(tmp_path)}
    assert len(after) == len(results(tmp_path)) == 4
    assert all(after[r["source"]] == r for r in before if "text" in r)
    assert after["in.jsonl:4"]["finish_reason"] == "length"
    assert {file.name for file in tmp_path.iterdir()} == {"in.jsonl", "job.toml", "results.jsonl"}


def test_a_run_keeps_its_output_while_failed_items_are_taken_out(tmp_path: Path) -> None:
    write_items(tmp_path, 2)
    job = load_job(write_job(tmp_path))
    with ResultFile(job.output, job.items) as file:
        file.append(job.items[0], RequestError("no"))
        file.forget_failed()
        assert file.done == file.failed == set()
        with pytest.raises(ConfigError, match="another run is writing it"):
            ResultFile(job.output, job.items)
        file.append(job.items[1], RequestError("no"))
    assert [result["source"] for result in results(tmp_path)] == ["in.jsonl:2"]


def test_an_output_of_other_prompts_or_sampling_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_items(tmp_path, 2)
    path = write_job(tmp_path)
    assert main(["batch", "-q", str(path)]) == 0
    write_items(tmp_path, 3)  # one more is no trouble
    assert main(["batch", "-q", str(path)]) == 0
    assert len(texts(tmp_path)) == 3
    assert main(["batch", "-q", str(path), "-n", "5"]) == 2
    assert "results.jsonl, line 1: was made from another prompt, model or sampling" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text('{"q": "other"}\n')
    assert main(["batch", "-q", str(path)]) == 2


@pytest.mark.parametrize("content", ["my notes", "my\nnotes", '{"a": 1}', '{"source": "x", "key": "y"}\nnotes'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    write_items(tmp_path, 1)
    job = load_job(write_job(tmp_path))
    job.output.write_text(content)
    with pytest.raises(ConfigError, match=r"results.jsonl, line [12]: (is no result|was made from another)"):
        ResultFile(job.output, job.items)
    assert job.output.read_text() == content


def test_an_output_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    write_items(tmp_path, 1)
    job = load_job(write_job(tmp_path))
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ConfigError, match="cannot be kept from other runs: No locks available; choose a file on"):
        ResultFile(job.output, job.items)


def test_two_runs_at_a_time_are_one_too_many(tmp_path: Path) -> None:
    write_items(tmp_path, 1)
    job = load_job(write_job(tmp_path))
    with ResultFile(job.output, job.items), pytest.raises(ConfigError, match="another run is writing it"):
        ResultFile(job.output, job.items)
    ResultFile(job.output, job.items).close()


@given(st.integers(0, 2000))
def test_a_torn_last_line_is_dropped(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("torn")
    write_items(folder, 4)
    job = load_job(write_job(folder))
    lines = [json.dumps({"source": i.source, "key": i.key, "text": "é"}) + "\n" for i in job.items]
    data = "".join(lines).encode()[:cut]
    job.output.write_bytes(data)
    with ResultFile(job.output, job.items) as file:
        whole = data.count(b"\n")
        assert file.done == {item.source for item in job.items[:whole]}
    assert job.output.read_bytes() == "".join(lines[:whole]).encode()


def start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "engine", "batch", str(path)],
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(folder: Path, n: int, process: subprocess.Popen[str]) -> None:
    path = folder / "results.jsonl"
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= n):
        time.sleep(0.002)


@pytest.mark.slow
def test_no_kill_loses_or_repeats_an_answer(tmp_path: Path) -> None:
    n_kills = 10  # while it starts, reads what is done, computes, or writes a line
    n_items = 16 * n_kills  # more than can be done before the last kill
    write_items(tmp_path, n_items)
    path, chance, n_killed, n_done = write_job(tmp_path), random.Random(n_kills), 0, 0
    for _ in range(n_kills):
        process = start(path)
        wait_for_lines(tmp_path, n_done + chance.randrange(0, 8), process)
        time.sleep(chance.random() * 0.03)
        process.kill()
        n_killed += process.wait(60) == -signal.SIGKILL
        process.stderr.close()
        output = tmp_path / "results.jsonl"
        n_done = output.read_bytes().count(b"\n") if output.exists() else 0
    assert n_killed == n_kills
    assert main(["batch", "-q", str(path)]) == 0
    found = texts(tmp_path)
    assert len(found) == n_items
    (tmp_path / "results.jsonl").unlink()
    assert main(["batch", "-q", str(path)]) == 0
    assert texts(tmp_path) == found


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    write_items(tmp_path, 400)
    process = start(write_job(tmp_path))
    wait_for_lines(tmp_path, 2, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "of 400 items done; the same command goes on from here" in err
    assert "Traceback" not in err
    assert 2 <= len(texts(tmp_path)) < 400
