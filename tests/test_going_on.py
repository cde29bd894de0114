"""Going on from what an earlier run left, and several issues at once."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import CHEAP_GATE, LEVELS, Repository, Result
from test_limits import start, wait_until

PYTEST = ("--sandbox", "off", "--gate", "pytest -q")
CHEAP = ("--sandbox", "off", "--gate", CHEAP_GATE, "--no-baseline")
TEST = "from calc import triple\n\n\ndef test_triple():\n    assert triple(3) == 9\n"
WRONG = f"""
open("calc.py", "a").write("\\n\\ndef triple(x):\\n    return x + 3\\n")
open("test_triple.py", "w").write({TEST!r})
"""
CORRECT = """
import pathlib, sys
pathlib.Path(SEEN).write_text(sys.stdin.read())
code = pathlib.Path("calc.py")
code.write_text(code.read_text().replace("x + 3", "x * 3"))
"""


def go_on(result: Result) -> list[str]:
    """The words of the command that an ending prints to go on from its work."""
    (line,) = re.findall(r"^  go on: +python3 \S+ (.+)$", result.out + result.err, re.MULTILINE)
    return shlex.split(line)


@pytest.mark.parametrize("level", LEVELS)
def test_rejected_work_goes_on_with_a_note_and_the_last_verdict(
    repo: Repository, agent: Any, tmp_path: Path, level: str
) -> None:
    words = ("issue-to-pr", "issue.md", "--sandbox", level, "--gate", "pytest -q")
    rejected = repo.run(*words, agent=agent(WRONG))
    assert rejected.status == 1
    before = repo.state()
    same = repo.run(*go_on(rejected), "--json", agent="true")  # judges what is there
    assert (same.status, repo.state()) == (1, before)
    assert "triple(3) == 9" in same.err and same.report["continued"] in rejected.out
    repo.write("later.txt", "of the user's\n")
    repo.commit("go on meanwhile")
    seen = repo.path / "seen" if level == "off" else tmp_path / "seen"
    mends = agent(f"SEEN = {str(seen)!r}\n{CORRECT}")
    options = ("--note", "multiply <!-- hidden -->", "--json", "--writable", str(tmp_path))
    result = repo.run("issue-to-pr", "--continue", *words[2:], *options, agent=mends)
    report, brief = result.report, seen.read_text()
    assert (result.status, report["branch"], report["base"]) == (
        0,
        "agent/issue",
        same.report["base"],
    )
    assert sorted(report["files"]) == ["calc.py", "test_triple.py"]
    for told in ("An earlier run ended so: rejected", "multiply", "assert 6 == 9", "three times x"):
        assert told in brief
    assert "hidden" not in brief
    seen.unlink(missing_ok=True)


def test_proposal_goes_on_with_review_comments_to_a_second_one(
    repo: Repository, agent: Any, tmp_path: Path
) -> None:
    first = repo.run("issue-to-pr", "issue.md", *CHEAP, "--json", agent=agent(WRONG))
    assert first.status == 0 and repo.git("branch", "--show-current") == "agent/issue"
    repo.write("by_hand.py", "HAND = 1\n")
    repo.commit("a reviewer's own commit on the branch")
    mends = agent(f"SEEN = {str(tmp_path / 'seen')!r}\n{CORRECT}")
    comments = "Bob: this adds, it should multiply.\n"
    words = ("issue-to-pr", "issue.md", *CHEAP, "--json", "--continue", "agent/issue")
    second = repo.run(*words, "--note", "-", agent=mends, stdin=comments)
    report = second.report
    assert (second.status, report["branch"]) == (0, "agent/issue-2")
    assert report["base"] == first.report["base"] == repo.git("rev-parse", "agent/issue-2^")
    assert "x * 3" in repo.git("show", "agent/issue-2:calc.py")
    assert "by_hand.py" in report["files"] and comments in (tmp_path / "seen").read_text()
    assert repo.git("rev-parse", "agent/issue~") == first.report["commit"]


def test_work_at_a_limit_and_what_was_put_back_go_on(repo: Repository, agent: Any) -> None:
    late = repo.run(
        *("issue-to-pr", "issue.md", *CHEAP, "--agent-timeout", "1s"),
        agent=agent(
            f"import os, time\n{WRONG}\nos.mkdir('.x')\nopen('.x/y', 'w')\ntime.sleep(60)\n"
        ),
    )
    assert late.status == 4 and "limit of 1.0 s" in late.out
    result = repo.run(*go_on(late), "--json", agent="true")
    assert result.status == 0 and ".x/y" not in result.report["files"]
    (put_back,) = (f["detail"] for f in result.report["findings"] if f["path"] == ".x/y")
    words = shlex.split(put_back.partition("To let it in: ")[2])[2:]
    allowed = repo.run(*words, "--json", agent="true")
    assert allowed.status == 0 and ".x/y" in allowed.report["files"], allowed.err


@pytest.mark.parametrize("level", LEVELS)
def test_killed_run_goes_on_from_its_workspace(
    repo: Repository, agent: Any, hermetic: Path, level: str
) -> None:
    repo.write(".gitattributes", "*.py text eol=lf\n")
    repo.commit("attributes")
    tells = "pathlib.Path.home().joinpath('ready').touch()\ntime.sleep(60)"
    child = start(
        repo, "issue-to-pr", "issue.md", "--sandbox", level, "--gate", "pytest -q",
        output=subprocess.DEVNULL, AGENT_CMD=agent(f"import pathlib, time\n{WRONG}\n{tells}"),
    )  # fmt: skip
    wait_until(child, "ready")
    living = repo.run("issue-to-pr", "--continue", *CHEAP, agent="true")
    assert living.status == 3 and "no run here has left work" in living.out
    child.kill()
    child.wait()
    told = repo.run("self-heal", *CHEAP, "--dry-run", agent="true").out
    (line,) = re.findall(r"To go on from it: python3 \S+ (.+?); to look", told)
    judged = repo.run(*shlex.split(line), "--json", agent="true")
    assert judged.status == 1 and "assert 6 == 9" in judged.err, judged.err
    assert repo.git("show", f"{judged.report['kept']}:test_triple.py") == TEST.strip()


def test_repair_goes_on_and_so_does_work_outside_git(
    broken: Repository, agent: Any, tmp_path: Path
) -> None:
    first = broken.run("self-heal", *PYTEST, agent=agent("open('calc.py', 'a').write('# hm\\n')"))
    assert first.status == 2
    mends = "from pathlib import Path\np = Path('calc.py')\nt = p.read_text()\n"
    mends = agent(f"{mends}p.write_text(t.replace('x + 2', 'x * 2'))")
    result = broken.run(*go_on(first), "--json", agent=mends)
    assert result.status == 0 and "# hm" in broken.git("show", f"{result.report['branch']}:calc.py")
    broken.git("switch", "-q", "main")
    broken.write("calc.py", "def double(x):\n    return x * 2\n")
    (broken.path / ".git").rename(tmp_path / "git")
    outside = broken.run("issue-to-pr", "issue.md", *PYTEST, agent=agent(WRONG))
    assert outside.status == 1 and not (broken.path / "test_triple.py").exists()
    seen = agent(f"SEEN = {str(tmp_path / 'seen')!r}\n{CORRECT}")
    result = broken.run(*go_on(outside), "--json", agent=seen)
    assert result.status == 0 and "x * 3" in (broken.path / "calc.py").read_text(), result.err


def test_deleted_files_go_on_and_work_that_is_gone_is_refused(repo: Repository, agent: Any) -> None:
    deletes = agent("import os\nos.remove('test_calc.py')\nopen('a b.py', 'w').write('1 +')")
    words = ("issue-to-pr", "issue.md", "--sandbox", "off", "--no-baseline", "--gate", "false")
    first = repo.run(*words, "--json", agent=deletes)
    again = repo.run(*go_on(first), "--json", agent="true").report
    assert again["files"] == first.report["files"] == ["a b.py", "test_calc.py"]
    repo.git("update-ref", "-d", first.report["kept"])
    gone = repo.run(*go_on(first), agent="true")
    assert gone.status == 3 and "left no work, or it is gone; run without" in gone.err


def test_run_that_cannot_go_on_is_refused(repo: Repository, agent: Any) -> None:
    idle = repo.run("issue-to-pr", "issue.md", *CHEAP, "--json", agent=agent("pass")).report
    name = Path(idle["record"]).name
    for words, says in {
        ("issue-to-pr", "--continue"): "no run here has left work",
        ("issue-to-pr", "--continue", "nothing"): "'nothing' is no run here that has ended",
        ("issue-to-pr", "--continue", name): "left no work, or it is gone",
        ("self-heal", "--continue", name): "it was a run of issue-to-pr",
        ("issue-to-pr", "issue.md", "--note", " "): "--note is empty",
        ("issue-to-pr", "issue.md", "--note", "none.md"): "--note none.md is no file",
        ("issue-to-pr", "-", "--note", "-"): "standard input can be read once",
        ("issue-to-pr", "issue.md", "issue.md", "--continue"): "one issue at a time",
    }.items():
        result = repo.run(*words, *CHEAP, agent="true", stdin="# x\n")
        assert result.status == 3 and says in result.out, result.out


# ---------------------------------------------------------------------------------- several issues

SEVERAL = """
import os, signal, sys, time
brief = sys.stdin.read()
name = brief.partition("name: ")[2].split()[0]
text = open("calc.py").read()
if name in ("one", "two"):
    text = text.replace("x * 2", f"x * 2  # {name}")
open("calc.py" if name in ("one", "two") else "new.py", "w").write(text)
if name == "hangs":
    time.sleep(60)
if name == "killed":
    os.kill(os.getppid(), signal.SIGKILL)
if name == "waits":
    open(WAITS, "w")
    time.sleep(60)
"""


@pytest.fixture
def issues(repo: Repository) -> list[str]:
    names = ("one", "two", "three", "hangs", "killed", "waits")
    for name in names:
        repo.write(f"{name}.md", f"# Do {name}\n\nname: {name}\n")
    return [f"{name}.md" for name in names]


def test_three_issues_end_in_three_proposals_and_a_table_of_conflicts(
    repo: Repository, agent: Any, issues: list[str]
) -> None:
    before = repo.git("symbolic-ref", "HEAD")
    words = ("issue-to-pr", *issues[:3], *CHEAP, "--jobs", "3", "--json")
    result = repo.run(*words, agent=agent(SEVERAL))
    report, err = result.report, result.err
    assert (result.status, report["exit_code"]) == (0, 0), err
    assert [r["branch"] for r in report["runs"]] == ["agent/one", "agent/two", "agent/three"]
    assert [r["issue"] for r in report["runs"]] == issues[:3]
    assert report["conflicts"] == [{"branches": ["agent/one", "agent/two"], "files": ["calc.py"]}]
    assert "agent/one and agent/two conflict in calc.py" in err
    assert "agent/one and agent/three merge cleanly" in err
    assert all(f"  {name} │ PROPOSED (exit 0)" in err for name in ("one", "two", "three"))
    assert repo.git("symbolic-ref", "HEAD") == before


def test_one_that_hangs_and_one_that_is_killed_touch_no_other(
    repo: Repository, agent: Any, issues: list[str]
) -> None:
    words = ("issue-to-pr", *issues[2:5], "gone.md", *CHEAP, "--agent-timeout", "2s", "--json")
    result = repo.run(*words, agent=agent(SEVERAL))
    told = {r["issue"]: (r["outcome"], r["exit_code"]) for r in result.report["runs"]}
    assert told["three.md"] == ("proposed", 0) and told["hangs.md"] == ("agent-failed", 4)
    assert told["killed.md"] == (None, 137) and told["gone.md"] == ("refused", 3)
    assert result.status == 137 and result.report["conflicts"] == []
    again = repo.run("issue-to-pr", "killed.md", "--continue", *CHEAP, "--json", agent="true")
    assert again.status == 0 and again.report["files"] == ["new.py"], again.err


def test_signal_ends_them_all_and_keeps_the_work_of_each(
    repo: Repository, agent: Any, issues: list[str], tmp_path: Path
) -> None:
    command = agent(f"WAITS = {str(tmp_path / 'home/waits')!r}\n{SEVERAL}")
    words = ("issue-to-pr", "waits.md", "hangs.md", "one.md", *CHEAP)
    child = start(repo, *words, output=subprocess.PIPE, AGENT_CMD=command)
    wait_until(child, "waits")
    child.send_signal(signal.SIGINT)
    shown = child.communicate(timeout=60)[0].decode()
    assert child.returncode == 130 and "Traceback" not in shown, shown
    assert shown.count("INTERRUPTED (exit 130)") == 2 and "one.md    exit 130" in shown
    kept = repo.git("for-each-ref", "--format=%(refname)", "refs/agent-runner").split()
    assert any("new.py" in repo.git("show", "--stat", ref) for ref in kept)
    listed = subprocess.run(["ps", "axww", "-o", "command="], capture_output=True).stdout.decode()
    assert command not in listed


def test_issue_of_a_later_run_is_read_before_the_first_agent(repo: Repository, agent: Any) -> None:
    repo.write("two.md", "# Two\n\nname: two\n")
    rewrites = f"open({str(repo.path / 'two.md')!r}, 'w').write('# Mine')\nopen('x.py', 'w')\n"
    rewrites += "import sys\nprint('BRIEF', 'name: two' in sys.stdin.read())"
    words = ("issue-to-pr", "issue.md", "two.md", *CHEAP, "--jobs", "1", "--json")
    result = repo.run(*words, agent=agent(rewrites))
    assert (
        "two │   agent │ BRIEF True" in result.err and "issue │   agent │ BRIEF False" in result.err
    )
    assert [r["branch"] for r in result.report["runs"]] == ["agent/issue", "agent/two"]


def test_branch_that_is_another_one_now_is_not_taken_for_the_work(
    repo: Repository, agent: Any
) -> None:
    words = ("issue-to-pr", "issue.md", *CHEAP, "--no-switch", "--json")
    first = repo.run(*words, agent=agent("open('mine.py', 'w')")).report
    name = Path(first["record"]).name
    repo.write("colleague.py", "")
    theirs = repo.commit("a colleague's")
    repo.git("branch", "-f", "agent/issue", theirs)
    result = repo.run("issue-to-pr", *CHEAP, "--json", "--continue", name, agent="true")
    assert result.report["files"] == ["mine.py"], result.err
    assert "is not what was proposed any more" in result.err
    repo.git("branch", "-f", "agent/issue", first["commit"])
    repo.git("switch", "-q", "agent/issue")
    repo.git("merge", "-q", "--no-edit", "main")
    merged = repo.run("issue-to-pr", *CHEAP, "--continue", name, agent="true")
    assert merged.status == 3 and "was merged with something else since" in merged.out
    repo.git("switch", "-q", "main")
    noted = ("issue-to-pr", *CHEAP, "--note", "do more", "--continue", result.report["branch"])
    idle = repo.run(*noted, agent="true")
    assert idle.status == 4 and "changed nothing" in idle.out, idle.out
