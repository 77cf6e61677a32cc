"""Every example in the docs and in docstrings runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from engine.__main__ import main
from engine.batch import load_job
from engine.config import TABLES
from engine.tables import table_fields

REPO = Path(__file__).resolve().parent.parent
MODULES = [
    "engine",
    "engine.runtime.answering",
    "engine.runtime.engine",
    "engine.runtime.session",
    "engine.async_engine",
]
PAGES = [page for page in sorted(REPO.glob("docs/*.md")) if ">>>" in page.read_text()]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text().replace("\n```", "\n\n```")  # a fence would be read as output
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test)
    assert runner.failures == 0


def test_the_job_of_the_batch_page_is_one(tmp_path: Path) -> None:
    page = (REPO / "docs" / "batch.md").read_text()
    (tmp_path / "job.toml").write_text(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    (tmp_path / "questions.jsonl").write_text('{"question": "Why?"}\n')
    job = load_job(tmp_path / "job.toml")
    assert job.items[0].prompt[1]["content"] == "Answer in one sentence: Why?"
    assert job.config.sampling.seed == 1


def test_every_setting_and_command_the_pages_name_is_there() -> None:
    text = "\n".join(page.read_text() for page in REPO.glob("docs/*.md"))
    for table, key in re.findall(r"(?m)^\| `(model|engine|moe|sampling)\.(\w+)` \|", text):
        assert key in table_fields(TABLES[table])
    commands = set(re.findall(r"hot-experts ([a-z]+)", text))
    assert {"run", "chat", "info", "batch", "config", "completion"} <= commands
    for command in commands:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
