"""What a run says while it works and when it ends: the visible text, the report, the record."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import CHEAP_GATE, PROGRAM, ROOT, Repository, Result, isolate, needs_bwrap, small_app

SCHEMA = json.loads((ROOT / "tests" / "report.schema.json").read_text(encoding="utf-8"))

# Agents, as Python; REAL is the real repository's path, which a command's words cannot name.
TRIPLE = """
import pathlib
calc = pathlib.Path("calc.py")
calc.write_text(calc.read_text() + "\\n\\ndef triple(x):\\n    return x * 3\\n")
test = "from calc import triple\\n\\n\\ndef test_triple():\\n    assert triple(3) == 9\\n"
pathlib.Path("test_triple.py").write_text(test)
"""
WRONG = TRIPLE.replace("x * 3", "x + 3")
MEND = 'import pathlib\npathlib.Path("calc.py").write_text("def double(x):\\n    return x * 2\\n")\n'
FAIL = 'print("no credit left")\nraise SystemExit(7)\n'
ESCAPE = TRIPLE + 'import shutil\nheads = pathlib.Path(REAL, ".git/refs/heads")\n'
ESCAPE += 'shutil.copy(heads / "main", heads / "it\'s-mine")\n'
ENDED = TRIPLE + "import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
FLAKY = """
import pathlib, tempfile
mark = pathlib.Path(tempfile.gettempdir(), "ran-before")
ran_before = mark.exists()
mark.touch()


def test_flaky():
    assert ran_before
"""


class Case(NamedTuple):
    """A run to be made: its command line, its agent, what the app is like, and how it must end."""

    words: str
    agent: str | None
    outcome: str | None
    status: int
    app: str = ""  # broken | flaky | no-records


GATE = "--sandbox off --gate 'pytest -q'"
ISSUE = f"issue-to-pr issue.md {GATE}"
CHEAP = shlex.join(["issue-to-pr", "issue.md", "--no-baseline", "--gate", CHEAP_GATE])
CASES = {
    "proposed": Case(ISSUE, TRIPLE, "proposed", 0),
    "repaired": Case(f"self-heal {GATE}", MEND, "proposed", 0, "broken"),
    "already green": Case(shlex.join(["self-heal", "--gate", CHEAP_GATE]), MEND, "already-green", 0),
    "rejected": Case(ISSUE, WRONG, "rejected", 1),
    "gave up": Case(f"self-heal {GATE} --attempts 1", WRONG, "gave-up", 2, "broken"),
    "flaky": Case(f"self-heal {GATE}", MEND, "gave-up", 2, "flaky"),
    "refused arguments": Case("issue-to-pr issue.md --atempts 2", None, "refused", 3),
    "refused agent": Case("issue-to-pr issue.md", None, "refused", 3),
    "refused base": Case(ISSUE, TRIPLE, "refused", 3, "broken"),
    "agent failed": Case(CHEAP, FAIL, "agent-failed", 4),
    "agent idle": Case(CHEAP, "pass", "agent-failed", 4),
    "rule broken": Case(f"{CHEAP} --sandbox off", ESCAPE, "rule-broken", 5),
    "interrupted": Case(f"{CHEAP} --sandbox off", ENDED, "interrupted", 143),
    "fault": Case(CHEAP, TRIPLE, None, 70, "faulty program"),
    "dry run": Case(f"{ISSUE} --dry-run", TRIPLE, None, 0),
}
KEPT = """
The agent's work is kept:
  look at it:    git show refs/agent-runner/RECORD
  take it over:  git switch -c my-SLUG refs/agent-runner/RECORD
  drop it:       git update-ref -d refs/agent-runner/RECORD

Record: .git/agent-runner/RECORD
"""
ENDINGS = """
=== proposed
PROPOSED (exit 0): every check is green; the change is one commit on the new branch agent/issue, which is checked out now
  ✓ test_triple.py::test_triple fails without the change, and passes with it

It is yours now:
  look at it:    git show agent/issue
  add a remote:  git remote add origin ADDRESS
  push it:       git push -u origin agent/issue
  drop it:       git switch main && git branch -D agent/issue

Record: .git/agent-runner/RECORD
=== repaired
PROPOSED (exit 0): every check is green; the change is one commit on the new branch agent/self-heal, which is checked out now
  ✓ test_calc.py::test_double fails without the change, and passes with it

It is yours now:
  look at it:    git show agent/self-heal
  add a remote:  git remote add origin ADDRESS
  push it:       git push -u origin agent/self-heal
  drop it:       git switch main && git branch -D agent/self-heal

Record: .git/agent-runner/RECORD
=== already green
ALREADY-GREEN (exit 0): the gate is green at the base; there is nothing to repair

Record: .git/agent-runner/RECORD
=== rejected
REJECTED (exit 1): the gate is red after 1 attempt: pytest: 1 of 2 tests failed

pytest is red: 1 of 2 tests failed
  │ >       assert triple(3) == 9
  │ E       assert 6 == 9
  │ E        +  where 6 = triple(3)
  │ FAILED test_triple.py::test_triple - assert 6 == 9
KEPT
=== gave up
GAVE-UP (exit 2): the gate is red after 1 attempt: pytest: 2 of 2 tests failed; handed to a person

pytest is red: 2 of 2 tests failed
  │ >       assert double(3) == 6
  │ E       assert 5 == 6
  │ E        +  where 5 = double(3)
  │ >       assert triple(3) == 9
  │ E       assert 6 == 9
  │ E        +  where 6 = triple(3)
  │ FAILED test_calc.py::test_double - assert 5 == 6
  │ FAILED test_triple.py::test_triple - assert 6 == 9
KEPT
=== flaky
GAVE-UP (exit 2): the failure is flaky: red, then green with no change (pytest -q, test_flaky.py::test_flaky); a person should look at it

pytest is red: 1 of 2 tests failed
  │ >       assert ran_before
  │ E       assert False
  │ FAILED test_flaky.py::test_flaky - assert False

Record: .git/agent-runner/RECORD
=== refused arguments
REFUSED (exit 3): unrecognized arguments: --atempts 2; did you mean --attempts? (see agent_runner.py --help)
=== refused agent
REFUSED (exit 3): AGENT_CMD is not set; set it to your agent's one-shot command, or try --simulate good.
=== refused base
REFUSED (exit 3): the base is red (pytest: 1 of 1 tests failed); mend it first with: python3 PROGRAM self-heal --gate 'pytest -q'

pytest is red: 1 of 1 tests failed
  │ >       assert double(3) == 6
  │ E       assert 5 == 6
  │ E        +  where 5 = double(3)
  │ FAILED test_calc.py::test_double - assert 5 == 6
KEPT
=== agent failed
AGENT-FAILED (exit 4): the agent ended with status 7
  agent │ no credit left

Record: .git/agent-runner/RECORD
=== agent idle
AGENT-FAILED (exit 4): the agent changed nothing

Record: .git/agent-runner/RECORD
=== rule broken
RULE-BROKEN (exit 5): something of yours was changed: refs/heads/it's-mine was created

What changed, and the command that undoes each:
  refs/heads/it's-mine was created
    git update-ref --no-deref -d 'refs/heads/it'"'"'s-mine'
KEPT
=== interrupted
INTERRUPTED (exit 143): ended by a signal
KEPT
=== fault
FAULT (exit 70): a fault in the program itself; its traceback is in FILE
=== dry run
"""  # noqa: E501


class Ended(NamedTuple):
    """A run of the table, made."""

    case: Case
    app: Repository
    result: Result

    @property
    def ending(self) -> str:
        """What it printed from its outcome on, without what differs from run to run."""
        text = self.result.err.replace(str(PROGRAM), "PROGRAM").rpartition(" (exit ")
        text = text[0].rpartition("\n")[2] + "".join(text[1:])
        text = re.sub(r"\S*agent_runner-fault-\S*", "FILE", text)
        return re.sub(r"\d{8}-\d{6}-[\w-]+", "RECORD", text).replace("my-issue ", "my-SLUG ").rstrip("\n")

    def steps(self) -> dict[str, str]:
        """The commands that it printed, by what they are for."""
        return dict(re.findall(r"^  ([a-z ]+): +(git .*)$", self.result.err, re.MULTILINE))

    def paste(self, command: str) -> str:
        """Run a printed command as a person would, in a shell."""
        done = subprocess.run(["sh", "-ec", command], cwd=self.app.path, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()


def make(case: Case, folder: Path) -> Ended:
    """Make one run of the table, in an app of its own."""
    folder.mkdir()
    app = small_app(folder / "app")
    if case.app == "broken":
        app.write("calc.py", "def double(x):\n    return x + 2\n")
    if case.app == "flaky":
        app.write("test_flaky.py", FLAKY)
    app.commit("as the case wants it")
    program = PROGRAM
    if case.app == "faulty program":
        program = folder / "faulty_agent_runner.py"
        program.write_text(PROGRAM.read_text("utf-8").replace("def run_agent(", "def run_agent_no_more("), "utf-8")
    script = folder / "agent.py"
    script.write_text(f"REAL = {str(app.path)!r}\n{case.agent}", encoding="utf-8")
    agent = shlex.join([sys.executable, "-S", str(script)]) if case.agent else None
    return Ended(case, app, app.run(*shlex.split(case.words), "--json", agent=agent, program=program))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Every run of the table, made once, two at a time."""
    folder = tmp_path_factory.mktemp("record")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        isolate(patch, folder / "home")
        patch.setenv("TMPDIR", str(folder))
        made = pool.map(lambda name: make(CASES[name], folder / name.replace(" ", "-")), CASES)
        return dict(zip(CASES, made, strict=True))


def misfits(value: Any, schema: dict[str, Any], at: str = "report") -> Iterator[str]:
    """Where a value does not fit a schema: the part of JSON Schema that ours uses, and no more."""
    used = {"$ref", "enum", "type", "pattern", "required", "properties", "additionalProperties", "items", "description"}
    assert schema.keys() <= used | {"$schema", "title", "$defs"}, f"{at}: the schema uses what is not checked here"
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    if "enum" in schema and not any(value is e or (value == e and type(value) is type(e)) for e in schema["enum"]):
        yield f"{at}: {value!r} is none of {schema['enum']}"
    names = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
    types = schema.get("type", [])
    for name in [types] if isinstance(types, str) else types:
        if (
            value is None
            if name == "null"
            else isinstance(value, names[name]) and (value is not True or name != "integer")
        ):
            break
    else:
        if types:
            yield f"{at}: {value!r} is no {types}"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{at}: {value!r} does not look like {schema['pattern']}"
    for number, item in enumerate(value if isinstance(value, list) else ()):
        yield from misfits(item, schema.get("items", {}), f"{at}[{number}]")
    if isinstance(value, dict):
        yield from (f"{at}: {key} is missing" for key in schema.get("required", ()) if key not in value)
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            if inner is False:
                yield f"{at}: {key} is not in the schema"
            else:
                yield from misfits(item, inner, f"{at}.{key}")


every_case = pytest.mark.parametrize("name", CASES)
kept_cases = pytest.mark.parametrize("name", ["rejected", "gave up", "refused base", "rule broken", "interrupted"])


@every_case
def test_each_outcome_has_its_exit_status_and_a_report_that_fits_the_schema(runs: dict[str, Ended], name: str) -> None:
    case, _, result = runs[name]
    assert (result.report["outcome"], result.status) == (case.outcome, case.status), result.err
    assert result.report["exit_code"] == case.status
    assert list(misfits(result.report, SCHEMA)) == []


@every_case
def test_ending_says_the_outcome_why_and_what_to_do_next(runs: dict[str, Ended], name: str) -> None:
    wanted = ENDINGS.partition(f"\n=== {name}\n")[2].partition("\n=== ")[0].rstrip("\n")
    slug = "issue" if CASES[name].words.startswith("issue") else "self-heal"
    wanted = wanted.replace("KEPT", KEPT.rstrip("\n")).replace(
        "my-SLUG ", "my-SLUG " if slug == "issue" else f"my-{slug} "
    )
    if name == "dry run":
        assert " (exit " not in runs[name].result.err
    else:
        assert runs[name].ending == wanted


@every_case
def test_standard_output_holds_the_report_alone_and_the_record_the_same(runs: dict[str, Ended], name: str) -> None:
    report, out = runs[name].result.report, runs[name].result.out
    assert out == json.dumps(report, indent=2) + "\n"
    if report["record"]:
        assert Path(report["record"], "report.json").read_text(encoding="utf-8") == out


@kept_cases
def test_kept_work_can_be_looked_at_taken_over_and_dropped_as_printed(runs: dict[str, Ended], name: str) -> None:
    run = runs[name]
    steps, report = run.steps(), run.result.report
    assert "+def triple(x):" in run.paste(steps["look at it"])
    if name == "rule broken":
        run.paste(re.findall(r"^    (git .*)$", run.result.err, re.MULTILINE)[0])
        assert "mine" not in run.app.git("show-ref")
    run.paste(steps["take it over"])
    assert run.app.git("branch", "--show-current").startswith("my-")
    assert run.app.tree("HEAD") == report["tree"]
    assert run.app.git("status", "--porcelain") == ""
    run.paste(steps["drop it"])
    assert run.app.git("for-each-ref", "refs/agent-runner") == ""


@pytest.mark.parametrize("name", ["proposed", "repaired"])
def test_proposal_can_be_looked_at_pushed_and_dropped_as_printed(
    runs: dict[str, Ended], name: str, tmp_path: Path
) -> None:
    run = runs[name]
    steps, report = run.steps(), run.result.report
    remote = Repository(tmp_path / "a remote.git")
    subprocess.run(["git", "init", "-q", "--bare", str(remote.path)], check=True)
    assert "calc.py" in run.paste(steps["look at it"])
    run.paste(steps["add a remote"].replace("ADDRESS", shlex.quote(str(remote.path))))
    run.paste(steps["push it"])
    assert remote.tree(report["branch"]) == report["tree"] == run.app.tree("HEAD")
    run.paste(steps["drop it"])
    assert run.app.git("for-each-ref", "--format=%(refname)", "refs/heads") == "refs/heads/main"
    assert run.app.git("branch", "--show-current") == "main"


def test_command_that_mends_a_red_base_works_as_printed(runs: dict[str, Ended]) -> None:
    run = runs["refused base"]
    run.app.git("switch", "-q", "--detach", run.result.report["base"])
    command = re.search(r"mend it first with: (.*)", run.result.err)
    assert command
    agent = shlex.join([sys.executable, "-S", "-c", MEND])
    done = subprocess.run(
        ["sh", "-c", command[1]], cwd=run.app.path, env=os.environ | {"AGENT_CMD": agent}, check=False
    )
    assert done.returncode == 0


@kept_cases
def test_record_holds_briefs_outputs_and_a_patch_that_applies(runs: dict[str, Ended], name: str) -> None:
    run = runs[name]
    report = run.result.report
    record = Path(report["record"])
    assert {"brief-1.md", "pr.md", "report.json", "change.patch"} <= {path.name for path in record.iterdir()}
    run.app.git("worktree", "add", "-q", "--detach", str(record / "there"), report["base"])
    there = Repository(record / "there")
    there.git("apply", "--index", str(record / "change.patch"))
    assert there.git("write-tree") == report["tree"]
    run.app.git("worktree", "remove", "--force", str(there.path))


def test_record_holds_each_output_of_agent_and_gate(runs: dict[str, Ended]) -> None:
    record = Path(runs["rejected"].result.report["record"])
    assert "assert 6 == 9" in (record / "gate-1-pytest.log").read_text(encoding="utf-8")
    record = Path(runs["agent failed"].result.report["record"])
    assert (record / "agent-1.log").read_text(encoding="utf-8") == "no credit left\n"


def test_dry_run_shows_the_plan_and_the_whole_brief_and_leaves_nothing(runs: dict[str, Ended]) -> None:
    _, app, result = runs["dry run"]
    brief = (Path(runs["proposed"].result.report["record"]) / "brief-1.md").read_text(encoding="utf-8")
    assert textwrap.indent(brief, "  │ ", lambda line: True).rstrip() in result.err
    assert "gate: pytest -q" in result.err and "branch: agent/issue" in result.err
    assert not (app.path / ".git" / "agent-runner").exists()
    assert app.git("for-each-ref", "--format=%(refname)") == "refs/heads/main"


def test_fault_saves_its_traceback_where_it_says(runs: dict[str, Ended]) -> None:
    path = runs["fault"].result.report["message"].rpartition(" ")[2]
    assert "Traceback" in Path(path).read_text(encoding="utf-8")


def test_each_step_is_announced_and_its_time_told(runs: dict[str, Ended]) -> None:
    lines = runs["proposed"].result.err.split("\n\nPROPOSED")[0].split("\n")
    announced = [re.sub(r"[:,] .*", "", line[2:]) for line in lines if line.startswith("▸ ")]
    assert announced == [
        "the workspace is made",
        "the gate judges the base",
        "attempt 1 of 1",
        "waiting for the verdict on the base",
        "the gate judges the change (2 files)",
        "proof",
    ]
    ends = [line for line, after in zip(lines, [*lines[1:], "▸ "], strict=True) if after.startswith("▸ ")]
    beside = [line for line in ends if line.startswith("▸ the gate judges the base, beside")]
    assert len(beside) == 1  # its end is waited for below
    assert all(re.search(r" \(\d+\.\d s\)$", line) for line in ends[1:] if line not in beside), ends


SLOW = "import time\nprint('reading \\x1b[31mcalc.py\\x1b[0m', flush=True)\ntime.sleep(1.2)\n" + TRIPLE


def on_terminal(app: Repository, agent: str, **env: str) -> str:
    """What a person's terminal gets of a run."""
    pty = pytest.importorskip("pty")
    environ = os.environ | {"AGENT_CMD": agent, "TERM": "xterm", "COLUMNS": "300"} | env
    ours, theirs = pty.openpty()
    words = [sys.executable, str(PROGRAM), *shlex.split(CHEAP)]
    with subprocess.Popen(words, cwd=app.path, env=environ, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        text = b""
        try:
            while chunk := os.read(ours, 65536):
                text += chunk
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    return text.decode().replace("\r\n", "\n")


def settled(text: str) -> list[str]:
    """The lines that stay: without colours, without what was erased, without what differs from run to run."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rpartition("\r\x1b[K")[2] for line in text.split("\n")]
    return [re.sub(r"\d+\.\d s|\d{8}-\d{6}", "…", line).replace("issue-2", "issue") for line in lines]


def test_on_a_terminal_and_only_there_the_running_step_shows_its_time_and_the_latest_line(
    repo: Repository, agent: Any
) -> None:
    shown = on_terminal(repo, agent(SLOW), NO_COLOR="")
    repo.git("switch", "-q", "main")
    plain = repo.run(*shlex.split(CHEAP), agent=agent(SLOW.replace("1.2", "0"))).out
    assert "  0:00 reading calc.py\r\x1b[K" in shown
    assert "  0:01 reading calc.py\r\x1b[K" in shown
    assert "\x1b[1m▸ attempt 1 of 1" in shown
    assert "\x1b[31mcalc.py\x1b[0m" in shown
    assert "\r" not in plain and "\x1b" not in plain and "  0:0" not in plain
    assert settled(shown)[5:] == settled(plain)[5:]


def test_no_color_takes_the_colours_away(repo: Repository, agent: Any) -> None:
    shown = on_terminal(repo, agent("print('\\x1b[31mred\\x1b[0m')"), NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*m", shown)


HOSTILE_LOG = """
print("::error::a"); print("  ::set-output name=a::b"); print("##[add-mask]e"); print("x ##[error]c")
print("::stop-commands::mine"); print("::mine::"); print("::endgroup::"); print("::add-path::/tmp", end="")
"""


def obeyed(log: str) -> tuple[list[str], str]:
    """The commands that a forge's runner would take from a log, and the word that it still waits for."""
    commands, waits_for = [], ""
    for line in log.splitlines():
        found = re.match(r"\s*::([^\s:]+)(?: [^:]*)?::(.*)", line) or re.search(r"##\[([^\s\]]+)[^\]]*\](.*)", line)
        if not found or (waits_for and found[1] != waits_for):
            continue
        waits_for = found[2] if found[1] == "stop-commands" else ""
        commands += (
            [found[1]] if found[1] in ("group", "endgroup") or not re.match(r"stop-|[0-9a-f]{64}$", found[1]) else []
        )
    return commands, waits_for


@pytest.mark.parametrize("forge", ["GITHUB", "FORGEJO"])
def test_in_a_forges_runner_the_log_folds_and_the_summary_page_has_the_text(
    repo: Repository, agent: Any, tmp_path: Path, forge: str
) -> None:
    repo.write("issue.md", "# Triple ##[error]it\n")
    page = tmp_path / "summary.md"
    env = {f"{forge}_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(page)}
    result = repo.run(*shlex.split(CHEAP), "--json", agent=agent(HOSTILE_LOG + TRIPLE), env=env)
    assert obeyed(result.err) == (["group", "endgroup"], "")
    assert "agent │ ::error::a" in result.err
    text = Path(result.report["proposal"]["body_file"]).read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == text


@needs_bwrap
def test_agent_cannot_write_orders_to_a_forges_runner(repo: Repository, agent: Any, tmp_path: Path) -> None:
    names = ("GITHUB_ENV", "GITHUB_PATH", "GITHUB_STEP_SUMMARY", "FORGEJO_OUTPUT")
    files = {name: str(repo.write(f"../runner/{name}", "").resolve()) for name in names}
    order = "import os, sys\nassert not [name for name in os.environ if name.endswith(('_SUMMARY', '_OUTPUT'))]\n"
    order += "for path in sys.argv[1:]:\n    try:\n        print('x=y', file=open(path, 'a'))\n"
    order += "    except OSError as error:\n        print(error)\n"
    result = repo.run(*shlex.split(CHEAP), agent=agent(order + TRIPLE, arguments=shlex.join(files.values())), env=files)
    assert result.status == 0, result.out
    assert [path for path in files.values() if Path(path).read_text(encoding="utf-8")] == []


def test_outside_a_runner_no_command_of_its_is_printed_and_no_page_written(
    repo: Repository, agent: Any, tmp_path: Path
) -> None:
    page = tmp_path / "summary.md"
    result = repo.run(*shlex.split(CHEAP), agent=agent(TRIPLE), env={"GITHUB_STEP_SUMMARY": str(page)})
    assert "::" not in re.sub(r"agent │ .*|\S+\.py::\S+", "", result.out)
    assert not page.exists()


def test_no_part_of_a_withheld_value_is_printed_or_recorded(repo: Repository, agent: Any) -> None:
    secret = 'first "half"\nof-the-secret\\'
    result = repo.run(
        *shlex.split(CHEAP),
        "--json",
        agent=agent("import os\nprint(os.environ['MY_SECRET'])\n" + FAIL),
        env={"MY_SECRET": secret},
    )
    record = Path(result.report["record"])
    texts = [result.out, result.err, *(path.read_text(encoding="utf-8") for path in record.glob("*.*"))]
    assert not [text for text in texts if "half" in text or "of-the-secret" in text]
    assert "[withheld]" in result.err


def test_records_and_their_refs_are_kept_fifty_runs_long(repo: Repository, agent: Any) -> None:
    for number in range(55):
        name = f"20200101-0000{number:02}-old"
        repo.write(f".git/agent-runner/{name}/report.json", "{}")
        repo.git("update-ref", f"refs/agent-runner/{name}", "HEAD")
    assert repo.run(*shlex.split(CHEAP), agent=agent(FAIL)).status == 4
    left = sorted(path.name for path in (repo.path / ".git" / "agent-runner").glob("*-*"))
    assert len(left) == 50 and left[0].startswith("20200101-000006")
    assert len(repo.git("for-each-ref", "refs/agent-runner").splitlines()) == 49
