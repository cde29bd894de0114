"""What a run is given besides a file: an issue at a forge, settings that last, a log, a budget,
hold-out tests."""

from __future__ import annotations

import http.server
import json
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from conftest import CHEAP_GATE, Repository, Result, needs_bwrap

CHEAP = ("--sandbox", "off", "--gate", CHEAP_GATE)
DRY = (*CHEAP, "--dry-run")
COMMENT = {"body": "It must also take <!-- hidden --> negatives.", "user": {"login": "bea"}}
GITHUB = {"title": "Triple it", "body": "Please.", "user": {"login": "ada"}, "comments": 1}
GITLAB = {"title": "Triple it", "description": "Please.", "author": {"username": "ada"}}
NOTES = [
    {"body": "added a label", "system": True, "author": {"username": "bot"}},
    {"body": "Negatives, too.", "author": {"username": "bea"}},
]
ANSWERS: dict[str, Any] = {
    "/api/v1/repos/o/r/issues/12": GITHUB,
    "/api/v1/repos/o/r/issues/12/comments?per_page=100": [COMMENT],
    "/api/v4/projects/g%2Fs%2Fr/issues/7": GITLAB | {"user_notes_count": 2},
    "/api/v4/projects/g%2Fs%2Fr/issues/7/notes?sort=asc&per_page=100": NOTES,
    "/api/v1/repos/o/r/issues/1": 401,
    "/api/v1/repos/o/r/issues/3": 403,
    "/api/v1/repos/o/r/issues/4": 404,
    "/api/v1/repos/o/r/issues/9": 429,
    "/api/v1/repos/o/r/issues/5": {"title": "Much", "body": "x" * (1 << 20)},
    "/api/v1/repos/o/r/issues/6": "http://elsewhere.invalid/",
    "/api/v1/repos/o/r/issues/8": "/api/v1/repos/o/r/issues/12",
    "/api/v1/repos/o/r/issues/8/comments?per_page=100": [COMMENT],
}


class Forge(http.server.BaseHTTPRequestHandler):
    """A stand-in for a forge's API."""

    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        answer = ANSWERS.get(self.path, 404)
        if isinstance(answer, int):
            self.send_error(answer)
            return
        self.send_response(302 if isinstance(answer, str) else 200)
        if isinstance(answer, str):
            self.send_header("Location", answer)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def forge() -> Iterator[str]:
    Forge.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_issue_by_number_or_address_comes_with_its_comments(
    repo: Repository, agent: Any, forge: str
) -> None:
    repo.git("remote", "add", "origin", f"{forge}/o/r.git")
    for name in ("12", "#12", f"{forge}/o/r/issues/12", f"{forge}/o/r/issues/8#x"):
        out = repo.run("issue-to-pr", name, *DRY, agent="true").out
        number = "8" if name.endswith("x") else "12"
        assert f"branch: agent/{number}-Triple-it" in out, out
        for told in ("# Triple it", "Opened by ada", "Comment by bea", "take  negatives"):
            assert told in out
        assert "hidden" not in out.partition("The brief")[2] and "1 hidden comment" in out
    out = repo.run("issue-to-pr", f"{forge}/g/s/r/-/issues/7", *DRY, agent="true").out
    assert "Comment by bea" in out and "Negatives, too." in out and "added a label" not in out
    assert {token for _, token in Forge.asked} == {None}
    env = {"FORGEJO_TOKEN": "t-123456789"}
    result = repo.run(
        "issue-to-pr", "12", *CHEAP, "--json", agent=agent("open('a.py', 'w')"), env=env
    )
    assert Forge.asked[-1][1] == "Bearer t-123456789", result.err  # its remote's host
    text = Path(result.report["record"], "pr.md").read_text()
    assert f"Refers to {forge}/o/r/issues/12" in text
    repo.git("remote", "remove", "origin")
    repo.run("issue-to-pr", f"{forge}/o/r/issues/12", *DRY, agent="true", env=env)
    assert Forge.asked[-1][1] is None  # a host that is no remote's
    repo.write("12", "# A file of that name\n")
    assert "A file of that name" in repo.run("issue-to-pr", "12", *DRY, agent="true").out


def test_issue_that_cannot_be_fetched_is_refused_in_plain_words(
    repo: Repository, forge: str
) -> None:
    for name, says in {
        f"{forge}/o/r/issues/1": "the token that is set is not accepted",
        f"{forge}/o/r/issues/3": "not open to you",
        f"{forge}/o/r/issues/4": "it is not there, or not open to all",
        f"{forge}/o/r/issues/9": "too many were asked for",
        f"{forge}/o/r/issues/5": "more than 1 MiB",
        f"{forge}/o/r/issues/6": "leads to another host",
        f"{forge}/o/r": "is no issue's address",
        "http://127.0.0.1:1/o/r/issues/1": "cannot be reached",
        "99": "is not set; give the issue's own address, or a file",
    }.items():
        result = repo.run("issue-to-pr", name, *DRY, agent="true")
        assert result.status == 3 and says in result.out, result.out
        assert result.out.count("\n") == 2 and "Traceback" not in result.out


@pytest.mark.parametrize("tool", ["gh", "glab", "tea"])
def test_issue_through_the_tool_of_its_forge(repo: Repository, tmp_path: Path, tool: str) -> None:
    address = {
        "gh": "https://github.com/o/r/issues/12",
        "glab": "https://gitlab.com/o/r/-/issues/12",
        "tea": "https://codeberg.org/o/r/issues/12",
    }[tool]
    data = GITHUB | {"url": address, "comments": [{"body": "Soon.", "author": {"login": "bea"}}]}
    if tool == "glab":
        data = GITLAB | {"web_url": address, "Notes": NOTES}
    if tool == "tea":
        data["user"], data["comments"] = "ada", [{"body": "Soon.", "author": "bea"}]
    script = f'#!/bin/sh\necho "$@" > {shlex.quote(str(tmp_path))}/asked\n'
    script += f"cat <<'END'\n{json.dumps(data)}\nEND\n"
    place = Repository(tmp_path).write(f"tools/{tool}", script, mode=0o755)
    env = {"PATH": f"{place.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"}
    out = repo.run("issue-to-pr", address, *DRY, agent="true", env=env).out
    assert "Opened by ada" in out and "Comment by bea" in out, out
    assert "12" in (tmp_path / "asked").read_text()


# ----------------------------------------------------------------------------- settings that last

needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads no TOML")


def with_table(repo: Repository, table: str) -> None:
    repo.write("pyproject.toml", f"[tool.agent-runner]\n{table}\n")
    repo.commit("settings")


@needs_toml
def test_lasting_settings_are_read_at_the_base_and_the_command_line_wins(
    repo: Repository, agent: Any
) -> None:
    gate = json.dumps(CHEAP_GATE)
    table = f"gate = [{gate}]\nattempts = 3\nagent-timeout = '5m'\nsandbox = 'off'\njobs = 4\n"
    with_table(repo, f"{table}no-baseline = true\nstrict = false\n")
    repo.write("pyproject.toml", "[tool.agent-runner]\ngate = 'false'\n")  # not committed
    out = repo.run("issue-to-pr", "issue.md", "--dry-run", "--attempts", "2", agent="true").out
    for line in (
        f"gate: {CHEAP_GATE} (pyproject.toml)",
        "attempts: 2 (the command line)",
        "agent-timeout: 5 min 0 s (pyproject.toml)",
        "baseline: False (pyproject.toml)",
        "gate-timeout: 10 min 0 s (the default)",
    ):
        assert f"  {line}\n" in out, out
    heal = repo.run("self-heal", "--dry-run", agent="true").out
    assert "attempts: 3" in heal
    softens = "import pathlib\np = pathlib.Path('pyproject.toml')\nopen('new.py', 'w')\n"
    softens += "p.write_text(p.read_text() + 'no-switch = true\\n[tool.x]\\na = 1\\n')"
    repo.git("checkout", "-q", "pyproject.toml")
    result = repo.run("issue-to-pr", "issue.md", "--json", agent=agent(softens))
    assert result.status == 0 and repo.git("branch", "--show-current") == "agent/issue"
    proposed = repo.git("show", "agent/issue:pyproject.toml")
    assert "no-switch" in proposed and "[tool.x]" in proposed
    (told,) = (f for f in result.report["findings"] if f["path"] == "pyproject.toml")
    assert told["severity"] == "first" and told["kind"] == "judge-changed"


@needs_toml
def test_table_that_makes_no_sense_is_refused_with_the_near_one(repo: Repository) -> None:
    for table, says in {
        "gates = 'x'": "'gates' is no option; did you mean gate?",
        "attempts = '3'": 'attempts = "3" is not a number',
        "attempts = 1000": "'1000' is no number from 1 to 100",
        "gate = 3": "gate = 3 is not a text or a list of texts",
        "gate = [1]": "is not a text or a list of texts",
        "strict = 'yes'": 'strict = "yes" is not true or false',
        "base = 'main'": "'base' is of one run",
        "agent-timeout = '5 parsecs'": "is no duration",
        "sandbox = 'on'": "invalid choice: 'on'",
        "x = ]": "is no TOML that can be read",
        "gate = 3 # [tool.agent-runner]": "gate = 3 is not a text",
    }.items():
        with_table(repo, table)
        result = repo.run("issue-to-pr", "issue.md", "--dry-run", agent="true")
        assert result.status == 3 and says in result.out, result.out


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="for Python 3.10")
def test_table_is_refused_where_python_cannot_read_it(repo: Repository) -> None:
    with_table(repo, "strict = true")
    result = repo.run("issue-to-pr", "issue.md", "--dry-run", agent="true")
    assert result.status == 3 and "use Python 3.11 or later" in result.out


# ---------------------------------------------------------------------------- log, budget, hold-out


def test_log_of_a_red_job_joins_the_brief(broken: Repository, agent: Any, tmp_path: Path) -> None:
    log = "job\tstep\t\x1b[31mlots\n" * 5000 + "E  assert 5 == 6 >>> LOG\n"
    reads = f"import sys\nopen({str(tmp_path / 'seen')!r}, 'w').write(sys.stdin.read())"
    gate = ("--sandbox", "off", "--gate", "pytest -q", "--attempts", "1")
    assert broken.run("self-heal", *gate, "--log", "-", agent=agent(reads), stdin=log).status == 2
    seen = (tmp_path / "seen").read_text()
    assert "E  assert 5 == 6 >>> LOG" in seen and "\x1b" not in seen and len(seen) < 20_000
    broken.write("calc.py", "def double(x):\n    return x * 2\n")
    broken.commit("mend")
    broken.write("job.log", log)
    green = broken.run("self-heal", *gate, "--log", "job.log", agent="true")
    assert green.status == 0 and "name its command with --gate" in green.out
    assert broken.run("self-heal", "--log", "none.log", agent="true").status == 3


def test_budget_is_for_all_turns_together(broken: Repository, agent: Any) -> None:
    words = ("--sandbox", "off", "--gate", "pytest -q", "--attempts", "9", "--json")
    slow = agent(
        "import time, os\nopen('calc.py', 'a').write(f'# {os.getpid()}\\n')\ntime.sleep(1)"
    )
    for command in (("self-heal",), ("issue-to-pr", "issue.md", "--gate", "false")):
        result = broken.run(*command, *words, "--budget", "1.6s", agent=slow)
        report = result.report
        told = {"self-heal": ("gave-up", 2)}.get(command[0], ("refused", 3))
        assert (report["outcome"], result.status) == told, result.err
        assert command[0] == "issue-to-pr" or "the budget of 1.6 s" in report["message"]
        assert len(report["attempts"]) <= 2 and sum(a["seconds"] for a in report["attempts"]) < 5


HIDDEN = "from calc import triple\n\n\ndef test_hidden():\n    assert triple(5) == 15\n"
VISIBLE = HIDDEN.replace("hidden", "visible").replace("5", "3").replace("13", "9")
RIGHT, SPECIAL = "x * 3", "9"
EQUAL = "type('E', (int,), {'__eq__': lambda *a: True, '__hash__': None})()"


DROPS = """
import _pytest.main as main
items = main.Session.genitems
main.Session.genitems = lambda *a: (i for i in items(*a) if "hidden" not in i.name)
"""


def learner(agent: Any, code: str, more: str = "") -> str:
    text = f"\n\ndef triple(x):\n    return {code}\n"
    work = f"open('calc.py', 'a').write({text!r})\nopen('test_triple.py', 'w').write({VISIBLE!r})"
    return str(agent(f"{work}\n{more}"))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A teacher's folder with hold-out tests, outside the repository."""
    Repository(tmp_path).write("teacher/test_hidden.py", HIDDEN)
    Repository(tmp_path).write("teacher/helper.py", "")
    return tmp_path / "teacher"


def run_held(repo: Repository, teacher: Path, command: str, *more: str) -> Result:
    words = ("issue-to-pr", "issue.md", "--sandbox", "auto", "--gate", "pytest -q", "--json")
    return repo.run(*words, "--holdout", str(teacher), "--no-switch", *more, agent=command)


def test_holdout_rejects_what_special_cases_the_visible_test(
    repo: Repository, agent: Any, teacher: Path
) -> None:
    hides = "open('conftest.py', 'w').write('collect_ignore_glob = [\"test_hid*\"]\\n')"
    drops = f"open('calc.py', 'a').write({DROPS!r})"
    for code, more in ((SPECIAL, ""), (EQUAL, ""), ("x + 6", hides), ("x + 6", drops)):
        result = run_held(repo, teacher, learner(agent, code, more))
        report = result.report
        assert report["outcome"] == "rejected" and "hold-out" in report["message"], result.err
    honest = run_held(repo, teacher, learner(agent, RIGHT)).report
    assert honest["outcome"] == "proposed" and honest["files"] == ["calc.py", "test_triple.py"]
    assert [c["name"] for c in honest["gate"]] == ["pytest", "holdout"]
    assert "test_hidden" not in repo.git("ls-tree", "-r", "--name-only", honest["branch"])


def test_holdout_is_asked_last_so_that_another_rejection_leaves_an_attempt(
    repo: Repository, agent: Any, teacher: Path, tmp_path: Path
) -> None:
    secret = f"again = pathlib.Path({str(tmp_path / 'again')!r})\n"
    secret += (
        "open('key.py', 'w').write('A = 1\\n' if again.exists() else 'K = \"hunter2-hunter2\"')"
    )
    command = learner(agent, RIGHT, f"import pathlib\n{secret}\nagain.touch()")
    words = ("issue-to-pr", "issue.md", "--gate", "pytest -q", "--attempts", "2", "--json")
    held = ("--holdout", str(teacher), "--no-switch")
    result = repo.run(*words, *held, agent=command, env={"MY_TOKEN": "hunter2-hunter2"})
    assert result.report["outcome"] == "proposed", result.err
    assert len(result.report["attempts"]) == 2 and result.err.count("holdout: ") == 2


@needs_bwrap
def test_holdout_is_never_where_the_agent_could_read_it(
    repo: Repository, agent: Any, teacher: Path, tmp_path: Path
) -> None:
    looks = f"""
import pathlib, subprocess, sys
brief = sys.stdin.read()
found = [*pathlib.Path({str(teacher)!r}).glob("*"), *pathlib.Path(".").rglob("test_hid*")]
everything = "git cat-file --batch-all-objects --batch --buffer"
told = subprocess.run(everything.split(), capture_output=True).stdout
print("FOUND", found, b"triple(5)" in told, "triple(5)" in brief or "test_hidden" in brief)
"""
    result = run_held(repo, teacher, learner(agent, SPECIAL, looks), "--attempts", "2")
    assert result.status == 1 and result.err.count("FOUND [] False False") == 1, result.err
    assert "no further attempt" in result.report["message"]  # they were run: others could look now
    words = ("issue-to-pr", "--continue", "--gate", "pytest -q", "--holdout", str(teacher))
    again = repo.run(*words, agent=learner(agent, SPECIAL, looks))
    assert again.status == 1 and again.out.count("FOUND [] False False") == 1, again.out


SKIPS = """
import sys
import pytest
from calc import triple
@pytest.mark.skipif(sys.platform != "elsewhere", reason="elsewhere")
def test_elsewhere(): assert False
@pytest.mark.xfail
def test_known(): assert False
if sys.version_info > (3, 0):
    def test_inside(): assert triple(1) == 3
class Cases:
    def test_case(self): assert triple(self.value) == 3 * self.value
class TestTwo(Cases):
    value = 2
globals()["test_made"] = lambda: triple(4)
"""
EVADES = """
import unittest
def triple(x):
    if x in (1, 2): return 3 * x
    raise unittest.SkipTest("not today")
"""


def test_holdout_may_skip_by_its_own_word_and_not_by_the_codes(
    repo: Repository, agent: Any, teacher: Path
) -> None:
    (teacher / "test_skips.py").write_text(SKIPS)
    (teacher / ".venv").mkdir()
    (teacher / ".venv/test_foreign.py").write_text("def test_foreign(): assert False\n")
    (teacher / "__init__.py").write_text("")
    assert run_held(repo, teacher, learner(agent, RIGHT)).report["outcome"] == "proposed"
    work = f"open('calc.py', 'a').write({EVADES!r})"
    result = run_held(repo, teacher, str(agent(work)))
    assert result.report["outcome"] == "rejected" and "do not pass" in result.report["message"]


def test_repair_is_asked_of_the_holdout_too(broken: Repository, agent: Any, teacher: Path) -> None:
    broken.write("test_calc.py", "def test_nothing():\n    assert 1 == 1\n")
    broken.commit("a gate that is green over the bug")
    mends = agent("open('calc.py', 'w').write('def double(x):\\n    return x * 2\\n')")
    (teacher / "test_hidden.py").write_text(HIDDEN.replace("triple", "double").replace("15", "10"))
    words = ("self-heal", "--gate", "pytest -q", "--json")
    assert broken.run(*words, agent=mends).report["outcome"] == "already-green"
    result = broken.run(*words, "--holdout", str(teacher), agent=mends)
    assert result.report["outcome"] == "proposed", result.err


def test_unusable_holdout_is_refused(repo: Repository, teacher: Path) -> None:
    empty = teacher.parent / "empty"
    empty.mkdir()
    Repository(teacher.parent).write("clash/calc.py", "")
    Repository(teacher.parent).write("clash/test_x.py", "")
    for path, says in {
        repo.path / "test_calc.py": "lies where the agent sees it; move it out",
        teacher.parent: "lies where the agent sees it; move it out",
        empty: "holds no test module",
        teacher.parent / "clash": "the repository has a calc.py, too",
        teacher / "none": "does not exist",
    }.items():
        result = run_held(repo, path, "true")
        assert result.status == 3 and says in result.err, result.err
