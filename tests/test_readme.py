"""What a newcomer reads first: the README's session, outcomes, options and own agent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PROGRAM, ROOT, Repository, needs_bwrap

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SESSION = re.compile(r"<!-- session: (.*) -->\n```text\n(.*?)```", re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path) -> Repository:
    """A fresh clone of this repository, its files as they lie here."""
    made = Repository(tmp_path / "agent-runner")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(made.path)], check=True)
    made.git("switch", "-q", "-C", "main")
    made.git("config", "user.name", "You")
    made.git("config", "user.email", "you@example.invalid")
    made.git("remote", "remove", "origin")
    words = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(words, capture_output=True, check=True)
    for name in os.fsdecode(listed.stdout).split("\0")[:-1]:
        if (ROOT / name).is_file():
            (made.path / name).write_bytes((ROOT / name).read_bytes())
    made.commit("as it is here")
    return made


def settled(text: str) -> str:
    """A session without what differs from run to run: times, commits, folders."""
    text = re.sub(r"\b\d+(\.\d+)? (s|min)\b", "0.0 s", text)
    text = re.sub(r"base: [0-9a-f]{12}", "base: 0", text)
    text = re.sub(r"\S*/agent_runner\.py", "agent_runner.py", text)
    text = re.sub(r"\d{8}-\d{6}", "0", re.sub(r"\S*/\.git/agent-runner", ".git/agent-runner", text))
    return re.sub(r"(0\.0 s )+0\.0 s", "0.0 s", text).strip()


@needs_bwrap
def test_session_is_what_the_program_prints(clone: Repository) -> None:
    match = SESSION.search(TEXT)
    assert match and match[1] in TEXT.split("```sh")[1].split("```")[0]
    result = clone.run(*match[1].split(), program=clone.path / "agent_runner.py")
    assert result.status == 0
    assert settled(match[2]) == settled(result.out)


def test_own_agent_works_as_written(clone: Repository) -> None:
    script = TEXT.partition("<!-- own-agent -->")[2].partition("```sh\n")[2].partition("```")[0]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    words, env = ["sh", "-e", "-c", script], os.environ | {"PATH": path}
    done = subprocess.run(words, cwd=clone.path, env=env, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
    assert "its tests pass without it, too" in done.stdout.decode()


def test_outcomes_and_options_are_those_of_the_program() -> None:
    told = dict(re.findall(r"^\| `([a-z-]+)` \| (\d+)[ ,|]", TEXT, re.MULTILINE))
    source = PROGRAM.read_text(encoding="utf-8")
    assert told == dict(re.findall(r'"([a-z-]+)": (\d+)', source.partition("FAULT =")[0]))
    help_text = ""
    for command in ("issue-to-pr", "self-heal"):
        words = [sys.executable, str(PROGRAM), command, "--help"]
        help_text += subprocess.run(words, capture_output=True, check=True).stdout.decode()
    spans = re.findall(r"^\| `(--[^`]+)`", TEXT, re.MULTILINE)
    named = {word for span in spans for word in re.findall(r"--[a-z-]+", span)}
    assert len(named) > 6 and {name for name in named if name not in help_text} == set()


def test_report_keys_are_all_documented() -> None:
    schema = (ROOT / "tests/report.schema.json").read_text(encoding="utf-8")
    table = TEXT.partition("## The record")[2].partition("## What it does not")[0]
    required = re.findall(r'"(\w+)"', schema.partition('"required": [')[2].partition("]")[0])
    assert len(required) > 15 and [key for key in required if f"`{key}`" not in table] == []
