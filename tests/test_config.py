"""Settings: every source, every way to get them wrong, and the file that documents them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import (
    TABLES,
    BenchSettings,
    EngineConfig,
    EngineSettings,
    ModelSettings,
    MoESettings,
    SamplingParams,
)
from engine.errors import ConfigError, EngineError, RequestError
from engine.tables import parse_bytes, table_fields

REPO = Path(__file__).resolve().parent.parent


def load(text: str, folder: Path, **more) -> EngineConfig:
    path = folder / "some.toml"
    path.write_text(text, encoding="utf-8")
    return EngineConfig.load(path, environ=more.pop("environ", {}), **more)


# -- the documented file ---------------------------------------------------------------------------------------------


def test_default_file_is_what_the_dataclasses_say() -> None:
    assert (REPO / "configs" / "default.toml").read_text(encoding="utf-8") == EngineConfig().to_toml()


def test_every_field_is_documented() -> None:
    for table in TABLES.values():
        for key, spec in table_fields(table).items():
            assert len(spec.doc) > 10, f"{table.table}.{key}"


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_file_loads(path: Path) -> None:
    config = EngineConfig.load(path, environ={})
    if match := re.match(r"(\d+)gb-(\d+)gb", path.name):
        budget = config.engine.vram_budget_bytes
        assert budget is not None
        assert 0.85 * int(match[1]) < budget / 1e9 < int(match[1])  # leaves some to driver and display
        assert config.moe.hot_k == "auto"


def test_written_file_reads_back_equal(tmp_path: Path) -> None:
    config = EngineConfig(
        ModelSettings('a "quoted" \\ näme.gguf', "memory"),
        EngineSettings(n_threads=3, kv_type="q8_0", device="cuda", vram_budget="22.2GB"),
        MoESettings(hot_k=44, swap_budget=0.125),
        SamplingParams(stop=("\n\n", "<|end|>", '"'), temperature=0.0, seed=7),
        BenchSettings(prompt_tokens=(1, 22, 333)),
    )
    assert load(config.to_toml(), tmp_path) == config


# -- precedence ------------------------------------------------------------------------------------------------------


def test_command_line_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    environ = {"LLAMA_ARG_MOE_HOT_K": "11", "LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL": "12", "UNRELATED": "x"}
    text = "[moe]\nhot_k = 1\nhot_rebalance_interval = 2\nhot_pp_bypass_n_tokens = 3\n"
    config = load(text, tmp_path, environ=environ, overrides={"moe.hot_k": "21"})
    assert config.moe == MoESettings(hot_k=21, hot_rebalance_interval=12, hot_pp_bypass_n_tokens=3)


def test_all_environment_variables() -> None:
    environ = {
        "LLAMA_ARG_MOE_HOT_K": "auto",
        "LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL": "61",
        "LLAMA_MOE_HOT_PP_BYPASS_N_TOKENS": "33",
        "ENGINE_ISA": "scalar",
    }
    config = EngineConfig.load(environ=environ)
    assert config.moe == MoESettings("auto", 61, 33)
    assert config.engine.isa == "scalar"


def test_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_MOE_HOT_K", "0")
    assert EngineConfig.load().moe.hot_k == 0


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("engine.n_threads", "4", 4),
        ("model.path", "123", "123"),  # text that looks like a number stays text where text is wanted
        ("model.path", "a=b.gguf", "a=b.gguf"),
        ("model.path", '"quoted.gguf"', "quoted.gguf"),
        ("moe.hot_k", "auto", "auto"),
        ("moe.hot_k", '"auto"', "auto"),
        ("sampling.temperature", "1", 1.0),
        ("sampling.ignore_eos", "true", True),
        ("sampling.stop", '["a", "b"]', ("a", "b")),
        ("sampling.stop", "[]", ()),
        ("bench.prompt_tokens", "16, 128", (16, 128)),
        ("bench.prompt_tokens", "16", (16,)),
        ("bench.prompt_tokens", (5, 6), (5, 6)),  # not only text, from a program
        ("bench.prompt_tokens", [5, 6], (5, 6)),
    ],
)
def test_overrides_are_read_as_the_type_of_the_field(key: str, text: object, value: object) -> None:
    table, _, name = key.partition(".")
    found = getattr(getattr(EngineConfig.load(overrides={key: text}, environ={}), table), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "value"), [("x=", ""), ("x = 1", 1), ("x=low", "low"), ("x=[]", ()), ("x=false", False)]
)
def test_variables_of_a_template(text: str, value: object) -> None:
    assert ModelSettings(chat_variables=(text,)).template_variables() == {"x": value}


def test_a_list_is_as_good_as_a_tuple() -> None:
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


# -- what is refused -------------------------------------------------------------------------------------------------

BAD_FILES = [
    # (TOML text, parts of the message)
    ("[model]\npath = 1", ["model.path is 1", "a string"]),
    ("[model]\npath = []", ["model.path is []", "a string"]),
    ("[model]\npath = true", ["model.path is True", "a string"]),
    ("[model]\npth = 'x'", ["unknown key model.pth", "did you mean path"]),
    ("[model]\nload = 'mmapp'", ["model.load is 'mmapp'", '"mmap"', '"memory"']),
    ("[model]\nload = 0", ["model.load is 0"]),
    ("[model]\nn_threads = 2", ["unknown key model.n_threads", "belongs in [engine]"]),
    ("[modle]\npath = 'x'", ["unknown table [modle]", "did you mean model"]),
    ("[zzz]", ["unknown table [zzz]", "model, engine, moe, sampling, bench"]),
    ("path = 'x'", ["unknown key path outside of a table"]),
    ("model = 'x'", ["model is 'x'", "expected a table"]),
    ("[[model]]\npath = 'x'", ["expected a table"]),
    ("[engine]\ndevice = 'gpu'", ["engine.device is 'gpu'", '"cuda"']),
    ("[engine]\ndevice = ''", ["engine.device is ''"]),
    ("[engine]\ndevice = ['cpu']", ["engine.device is ['cpu']"]),
    ("[engine]\nn_threads = -1", ["engine.n_threads is -1", "from 0 to 1024"]),
    ("[engine]\nn_threads = 1025", ["engine.n_threads is 1025"]),
    ("[engine]\nn_threads = 2.0", ["engine.n_threads is 2.0", "an integer"]),
    ("[engine]\nn_threads = true", ["engine.n_threads is True", "an integer"]),
    ("[engine]\nn_threads = '2'", ["engine.n_threads is '2'", "an integer"]),
    ("[engine]\nthreads = 2", ["unknown key engine.threads", "did you mean n_threads"]),
    ("[engine]\nisa = 'AVX2'", ["engine.isa is 'AVX2'", '"avx2"']),
    ("[engine]\nisa = 'sse'", ["engine.isa is 'sse'"]),
    ("[engine]\ncontext_length = -5", ["engine.context_length is -5"]),
    ("[engine]\ncontext_length = 99999999999", ["engine.context_length"]),
    ("[engine]\ncontext_length = 1e3", ["engine.context_length is 1000.0"]),
    ("[engine]\ncontext_length = nan", ["engine.context_length is nan"]),
    ("[engine]\nmax_batch_tokens = 0", ["engine.max_batch_tokens is 0", "from 1 to"]),
    ("[engine]\nn_sequences = 0", ["engine.n_sequences is 0"]),
    ("[engine]\nkv_type = 'q4_0'", ["engine.kv_type is 'q4_0'", '"q8_0"']),
    ("[engine]\nkv_type = 'F16'", ["engine.kv_type is 'F16'"]),
    ("[engine]\nvram_budget = 22", ["engine.vram_budget is 22", "a string"]),
    ("[engine]\nvram_budget = '22'", ["engine.vram_budget is '22'", "22.2GB"]),
    ("[engine]\nvram_budget = '0GB'", ["engine.vram_budget", "above 0"]),
    ("[engine]\nvram_budget = '-1GB'", ["engine.vram_budget"]),
    ("[engine]\nvram_budget = 'lots'", ["engine.vram_budget is 'lots'"]),
    ("[engine]\nvram_budget = '1.2.3GB'", ["engine.vram_budget"]),
    ("[engine]\ndevice = 'cpu'\nvram_budget = '1GB'", ["engine.vram_budget", "engine.device is 'cpu'"]),
    ("[engine]\n2 = 3", ["unknown key engine.2"]),
    ("[moe]\nhot_k = -1", ["moe.hot_k is -1"]),
    ("[moe]\nhot_k = 'all'", ["moe.hot_k is 'all'", '"auto"', "an integer"]),
    ("[moe]\nhot_k = 1.5", ["moe.hot_k is 1.5"]),
    ("[moe]\nhot_k = false", ["moe.hot_k is False"]),
    ("[moe]\nhotk = 1", ["unknown key moe.hotk", "did you mean hot_k"]),
    ("[moe]\nhot_rebalance_interval = 0", ["moe.hot_rebalance_interval is 0"]),
    ("[moe]\nhot_rebalance_interval = 'never'", ["moe.hot_rebalance_interval is 'never'"]),
    ("[moe]\nhot_pp_bypass_n_tokens = 0", ["moe.hot_pp_bypass_n_tokens is 0"]),
    ("[moe]\npolicy = 'LRU'", ["moe.policy is 'LRU'", '"lru"']),
    ("[moe]\npolicy = {}", ["moe.policy is {}"]),
    ("[moe]\nswap_budget = 1.5", ["moe.swap_budget is 1.5", "from 0 to 1"]),
    ("[moe]\nswap_budget = inf", ["moe.swap_budget is inf"]),
    ("[moe]\nswap_budget = nan", ["moe.swap_budget is nan"]),
    ("[moe]\nn_cpu_moe = -2", ["moe.n_cpu_moe is -2"]),
    ("[moe]\nhot_k = 44\nn_cpu_moe = 10", ["moe.hot_k is 44", "moe.n_cpu_moe is 10"]),
    ("[moe]\nhot_k = 44\n[engine]\ndevice = 'cpu'", ["moe.hot_k is 44", "engine.device is 'cpu'"]),
    ("[moe]\nn_cpu_moe = 10\n[engine]\ndevice = 'cpu'", ["moe.n_cpu_moe is 10", "engine.device is 'cpu'"]),
    ("[sampling]\ntemperature = -0.1", ["sampling.temperature is -0.1"]),
    ("[sampling]\ntemperature = 'hot'", ["sampling.temperature is 'hot'", "a number"]),
    ("[sampling]\ntemperature = nan", ["sampling.temperature is nan"]),
    ("[sampling]\ntemperature = true", ["sampling.temperature is True"]),
    ("[sampling]\ntop_k = -1", ["sampling.top_k is -1"]),
    ("[sampling]\ntop_k = 0.5", ["sampling.top_k is 0.5"]),
    ("[sampling]\ntop_p = 1.01", ["sampling.top_p is 1.01"]),
    ("[sampling]\nmin_p = -1", ["sampling.min_p is -1"]),
    ("[sampling]\nrepetition_penalty = 0", ["sampling.repetition_penalty is 0"]),
    ("[sampling]\nmax_tokens = -1", ["sampling.max_tokens is -1"]),
    ("[sampling]\nseed = 9223372036854775808", ["sampling.seed"]),
    ("[sampling]\nstop = 'END'", ["sampling.stop is 'END'", "a list"]),
    ("[sampling]\nstop = ['a', 1]", ["sampling.stop is ['a', 1]", "a string"]),
    ("[sampling]\nstop = ['']", ["sampling.stop", "empty"]),
    ("[sampling]\nstop = [['a']]", ["sampling.stop is [['a']]"]),
    ("[sampling]\nignore_eos = 1", ["sampling.ignore_eos is 1", "true or false"]),
    ("[sampling]\nlogprobs = true", ["sampling.logprobs is True"]),
    ("[sampling]\nlogprobs = 101", ["sampling.logprobs is 101"]),
    ("[sampling]\ntemprature = 1", ["unknown key sampling.temprature", "did you mean temperature"]),
    ("[bench]\nprompt_tokens = []", ["bench.prompt_tokens is []", "at least one"]),
    ("[bench]\nprompt_tokens = 128", ["bench.prompt_tokens is 128", "a list"]),
    ("[bench]\nprompt_tokens = [0]", ["bench.prompt_tokens is [0]"]),
    ("[bench]\nprompt_tokens = [16, '32']", ["bench.prompt_tokens"]),
    ("[bench]\nreps = 0", ["bench.reps is 0"]),
    ("[bench]\nreps = 1979-05-27", ["bench.reps is datetime.date"]),
    # not TOML: the place is named
    ("[engine\nn_threads = 1", ["not valid TOML", "line 1"]),
    ("[engine]\nn_threads = ", ["not valid TOML", "line 2"]),
    ("[engine]\nn_threads = 1\nn_threads = 2", ["not valid TOML", "line 3"]),
    ("[engine]\ndevice = cpu", ["not valid TOML", "line 2"]),
    ("[model]\npath = 'x", ["not valid TOML", "line 2"]),
    ("[engine]\nn_threads: 4", ["not valid TOML", "line 2"]),
    ("{}", ["not valid TOML", "line 1"]),
]


@pytest.mark.parametrize(("text", "parts"), BAD_FILES, ids=[repr(text)[1:-1] for text, _ in BAD_FILES])
def test_bad_file_is_refused_with_its_name_and_the_key(text: str, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text, tmp_path)
    message = str(caught.value)
    assert re.match(rf"{re.escape(str(tmp_path / 'some.toml'))}(, line \d+)?: ", message)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n[engine]\nn_threads = 1\nkv_type = 'q9'\n", 4),
        ("[model]\nload = 'mmap'\n[engine]  # here\n\nload = 'x'\n", 5),
        ("engine.n_threads = 1\nengine . n_sequences = 0\n", 2),
        ("[model]\n[ngine]\n", 2),
        ("n_threads = 3\n", 1),
        ("[bench]\nprompt_tokens = [\n  1,\n  0]\n", 2),
    ],
)
def test_an_error_names_the_line(text: str, line: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"some\.toml, line {line}: "):
        load(text, tmp_path)


def test_there_are_enough_bad_files() -> None:
    assert len(BAD_FILES) >= 60


@pytest.mark.parametrize(
    ("overrides", "environ", "parts"),
    [
        ({"engine.n_threads": "x"}, {}, ["engine.n_threads is 'x'", "an integer"]),
        ({"engine.nthreads": "1"}, {}, ["setting engine.nthreads", "did you mean n_threads"]),
        ({"n_threads": "1"}, {}, ["setting n_threads", '"table.key"']),
        ({"engine.": "1"}, {}, ["setting engine.", '"engine.key"', "n_threads"]),
        ({"": "1"}, {}, ['"table.key"']),
        ({"bench.prompt_tokens": "1,x"}, {}, ["bench.prompt_tokens is '1,x'"]),
        ({"sampling.stop": "a"}, {}, ["sampling.stop is 'a'", "a list"]),
        ({"engine.device": "cpu", "moe.hot_k": "3"}, {}, ["moe.hot_k is 3", "engine.device is 'cpu'"]),
        ({}, {"LLAMA_ARG_MOE_HOT_K": "many"}, ["environment variable LLAMA_ARG_MOE_HOT_K: moe.hot_k is 'many'"]),
        ({}, {"LLAMA_ARG_MOE_HOT_K": ""}, ["environment variable LLAMA_ARG_MOE_HOT_K: moe.hot_k is ''"]),
        ({}, {"ENGINE_ISA": "mmx"}, ["environment variable ENGINE_ISA: engine.isa is 'mmx'"]),
        ({"moe.n_cpu_moe": "1"}, {"LLAMA_ARG_MOE_HOT_K": "1"}, ["environment variable", "moe.hot_k is 1 and"]),
    ],
)
def test_bad_override_or_variable_is_named(overrides: dict, environ: dict, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.load(None, overrides, environ)
    for part in parts:
        assert part in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml: cannot be read"):
        EngineConfig.load(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        EngineConfig.load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[model]\npath = '\xe4'\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        EngineConfig.load(tmp_path / "latin.toml")


def test_objects_check_themselves() -> None:
    with pytest.raises(ConfigError, match=r"engine\.n_threads is 'two'"):
        EngineSettings(n_threads="two")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"sampling\.top_p is 2"):
        SamplingParams(top_p=2)
    with pytest.raises(ConfigError, match=r"engine\.device is 'cpu'"):
        EngineConfig(engine=EngineSettings(device="cpu"), moe=MoESettings(hot_k=1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineSettings().n_threads = 3  # type: ignore[misc]


@given(st.text(max_size=60))
def test_no_text_in_a_variable_gets_past_the_checks(text: str) -> None:
    for variable in ("LLAMA_ARG_MOE_HOT_K", "ENGINE_ISA"):
        try:
            config = EngineConfig.load(environ={variable: text})
        except ConfigError:
            continue
        assert config.moe.hot_k == "auto" or config.moe.hot_k >= 0
        assert config.engine.isa in {"", "scalar", "avx2", "avx512", "avx512_vbmi"}


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1B", 1),
        ("22.2GB", 22_200_000_000),
        ("24 GiB", 24 << 30),
        ("512mib", 512 << 20),
        (" 3KB ", 3000),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_bytes(text, "x") == n_bytes
    assert EngineSettings(vram_budget=text).vram_budget_bytes == n_bytes
    assert EngineSettings().vram_budget_bytes is None


@pytest.mark.parametrize("digits", ["9" * 400, "9" * 5000])
def test_numbers_without_an_end(digits: str, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    for text in (f"[engine]\nn_threads = {digits}\n", f"[sampling]\ntemperature = {digits}\n", "x = " + "[" * 100_000):
        file.write_text(text)
        with pytest.raises(ConfigError):
            EngineConfig.load(file, environ={})
    for key in ("engine.n_threads", "sampling.temperature", "engine.vram_budget"):
        with pytest.raises(ConfigError):
            EngineConfig.load(overrides={key: digits + "GB" * (key == "engine.vram_budget")}, environ={})
    with pytest.raises(EngineError):
        SamplingParams(temperature=10**400)
