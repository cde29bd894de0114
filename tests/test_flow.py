"""Both commands from end to end: what a run leaves behind on each way that it can take."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import CHEAP_GATE, LEVELS, PROGRAM, Repository, needs_bwrap

PYTHON = f"{shlex.quote(sys.executable)} -S"
FIX = 'import pathlib; pathlib.Path("calc.py").write_text("def double(x):\\n    return x * 2\\n")'
ADD = 'import pathlib; pathlib.Path("triple.py").write_text("def triple(x):\\n    return x * 3\\n")'
RIGHT_GATE = f'{PYTHON} -c "import calc; assert calc.double(3) == 6"'
CHEAP = ("--json", "--gate", CHEAP_GATE, "--no-baseline", "--sandbox", "off")
ISSUE = ("issue-to-pr", "issue.md")
COMMANDS = {"issue-to-pr": (*ISSUE, "--no-baseline"), "self-heal": ("self-heal",)}
DEMO = ["agent_demo.py", "test_agent_demo_discount.py"]  # what the simulated agents write
# A gate that costs little and knows the demo's right answer, where there is a demo.
CHECK = "import agent_demo as demo; assert demo.apply_discount(200, 10) == 180"
DEMO_GATE = f"{PYTHON} -c \"import os; os.path.exists('agent_demo.py') and exec('{CHECK}')\""
# The course's variants with their exit statuses; VARIANTS are the others, each with its gate.
COURSE = {"issue-to-pr": {"good": 0, "bad": 1}, "self-heal": {"bad": 0, "stuck": 2}}
VARIANTS = {
    ("issue-to-pr", "cheat"): (1, "rejected", "pytest -q"),
    ("issue-to-pr", "escape"): (0, "proposed", CHEAP_GATE),
    ("issue-to-pr", "idle"): (4, "agent-failed", CHEAP_GATE),
    ("issue-to-pr", "hang"): (4, "agent-failed", CHEAP_GATE),
    ("self-heal", "cheat"): (2, "gave-up", DEMO_GATE),
    ("self-heal", "escape"): (0, "proposed", DEMO_GATE),
    ("self-heal", "flaky"): (2, "gave-up", "pytest -q"),
}


def branches(repo: Repository) -> list[str]:
    return repo.git("for-each-ref", "--format=%(refname:short)", "refs/heads").split("\n")


def without(state: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in state.items() if name not in names}


# -------------------------------------------------------------------------------- simulated agents


@pytest.mark.parametrize("at_work", [False, True], ids=["clean", "at-work"])
def test_course_sequence_leaves_all_that_is_not_committed_alone(
    repo: Repository, at_work: bool
) -> None:
    repo.write(".gitignore", "*.log\n.env\n")
    repo.commit("ignore")
    program = Path(shutil.copy(PROGRAM, repo.path / "agent_runner.py"))
    for name in ("notes.txt", "deep/er/notes.txt", ".env", "build.log"):
        repo.write(name, f"mine: {name}\n")
    if at_work:
        repo.write("calc.py", "def double(x):\n    return x * 2  # staged\n")
        repo.git("add", "calc.py")
        repo.write("calc.py", "def double(x):\n    return x * 2  # and edited\n")
        (repo.path / "test_calc.py").unlink()
    gate = ("--gate", DEMO_GATE, "--sandbox", "off") if at_work else ()

    def run(command: str, variant: str) -> None:
        words = ISSUE if command == "issue-to-pr" else (command,)
        result = repo.run(*words, "--simulate", variant, *gate, program=program)
        assert result.status == COURSE[command][variant], result.out

    start = repo.state()
    run("issue-to-pr", "bad")
    assert repo.state() == start and branches(repo) == ["main"]

    run("issue-to-pr", "good")
    told = repo.git("log", "--format=%P %s", "main..agent/issue")
    assert told == f"{repo.git('rev-parse', 'main')} Triple a number"
    listing = repo.git("diff", "--name-status", "main", "agent/issue")
    assert listing.split() == ["A", DEMO[0], "A", DEMO[1]]
    on = repo.git("symbolic-ref", "HEAD")
    assert on == f"refs/heads/{'main' if at_work else 'agent/issue'}"
    moved = ("refs", *(() if at_work else ("HEAD", "index", *DEMO)))
    assert without(repo.state(), *moved) == without(start, *moved)

    run("self-heal", "bad")
    assert repo.git("diff", "--name-only", "agent/self-heal^", "agent/self-heal") == DEMO[0]
    assert branches(repo) == ["agent/issue", "agent/self-heal", "main"]
    healed = repo.state()
    run("self-heal", "stuck")
    assert repo.state() == healed
    assert without(healed, *moved) == without(start, *moved)


@pytest.mark.parametrize(("command", "name"), VARIANTS)
def test_simulated_variant_ends_as_documented(repo: Repository, command: str, name: str) -> None:
    before, main = repo.state(), repo.git("rev-parse", "main")
    status, outcome, gate = VARIANTS[command, name]
    words = ISSUE if command == "issue-to-pr" else (command,)
    limit = ("--agent-timeout", "0.5") if name == "hang" else ()
    result = repo.run(*words, *limit, "--simulate", name, "--json", "--gate", gate)
    report = result.report
    assert (result.status, report["exit_code"], report["outcome"]) == (status, status, outcome)
    if outcome == "proposed":
        assert branches(repo) == [report["branch"], "main"]
        assert repo.tree(report["branch"]) == report["tree"]
        assert repo.git("rev-parse", "main") == main and report["moved"] == []
    else:
        assert repo.state() == before and report["branch"] is None
        kept = repo.git("for-each-ref", "--format=%(refname)", "refs/agent-runner/")
        assert kept == (report["kept"] or "")
    if name == "cheat":
        cheated = "conftest.py" if command == "issue-to-pr" else DEMO[1]
        assert cheated in {finding["path"] for finding in report["findings"]}
    if name == "flaky":
        assert report["attempts"] == [] and "flaky" in report["message"]


def test_every_variant_of_the_help_has_its_case(repo: Repository) -> None:
    for command in COMMANDS:
        told = repo.run(command, "--help").out
        listed = told.partition("--simulate writes")[2].partition("exit statuses")[0]
        names = {line.split()[0] for line in listed.splitlines()[1:] if line.strip()}
        assert names == {*COURSE[command], *(name for where, name in VARIANTS if where == command)}


# --------------------------------------------------------------------------------- what is proposed

TELL_TREE = "git status --porcelain --ignored; git add -A; git write-tree"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("command", COMMANDS)
def test_judged_tree_is_the_proposed_tree(
    broken: Repository, agent: Any, command: str, level: str
) -> None:
    """The gate looks at its own checkout: it holds the proposal, and no file beside it."""
    words = agent(f"{FIX}\npathlib.Path('new file.txt').write_text('new')\nopen('x.log', 'w')")
    broken.write(".gitignore", "*.log\n")
    main = broken.commit()
    gate = ("--gate", RIGHT_GATE, "--gate", f"sh -c '{TELL_TREE}'", "--sandbox", level, "--json")
    result = broken.run(*COMMANDS[command], *gate, agent=words)
    report = result.report
    assert (result.status, report["outcome"]) == (0, "proposed"), result.err
    tree = broken.tree(report["branch"])
    assert (Path(report["record"]) / "gate-1-sh.log").read_text().split() == [tree]
    assert (report["tree"], report["base"]) == (tree, main)
    assert report["commit"] == broken.git("rev-parse", report["branch"])
    assert broken.git("rev-parse", f"{report['branch']}^") == main
    changed = broken.git("diff", "--name-only", "main", report["branch"])
    assert changed == "calc.py\nnew file.txt"
    assert broken.git("log", "-1", "--format=%ae", report["branch"]) == "ada@example.invalid"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("way", ["{prompt_file}", "standard input"])
def test_brief_comes_as_the_command_asks(
    repo: Repository, agent: Any, way: str, level: str
) -> None:
    script = """
        #!/bin/sh
        grep -q 'returns three times x' $1 || exit 9
        if test -n "$1" && read -r line; then exit 7; fi
        echo 'def triple(x): return x * 3' > triple.py
    """
    words = agent(script, arguments=way if way.startswith("{") else "")
    result = repo.run(*ISSUE, *CHEAP[:-1], level, agent=words)
    assert result.status == 0, result.err


# ----------------------------------------------------------------------------------------- attempts


def test_failure_is_fed_back_to_the_next_attempt(
    repo: Repository, agent: Any, tmp_path: Path
) -> None:
    check = tmp_path / "check.sh"
    check.write_text("test ! -e answer || grep -q 42 answer || { echo IT-IS-NOT-42; exit 1; }\n")
    gate = (*ISSUE, "--json", "--sandbox", "off", "--gate", f"sh {check}")
    again = 'os.path.exists("answer") and "IT-IS-NOT-42" in sys.stdin.read()'
    words = agent(f'import os, sys\nn = 42 if {again} else 41\nopen("answer", "w").write(str(n))')
    once = repo.run(*gate, agent=words)
    assert (once.status, once.report["outcome"], len(once.report["attempts"])) == (1, "rejected", 1)
    twice = repo.run(*gate, "--attempts", "3", agent=words)
    assert (twice.status, len(twice.report["attempts"])) == (0, 2), twice.err
    passed = [attempt["gate"][0]["passed"] for attempt in twice.report["attempts"]]
    assert passed == [False, True]


def test_repair_stops_at_two_attempts_and_hands_over(
    repo: Repository, agent: Any, tmp_path: Path
) -> None:
    words, before = agent("open('more.txt', 'a').write('again\\n')"), repo.state()
    gate = ("--gate", f"sh -c 'echo >> {tmp_path}/runs; exit 1'", "--sandbox", "off")
    result = repo.run("self-heal", "--json", *gate, agent=words)
    report = result.report
    assert (result.status, report["outcome"], len(report["attempts"])) == (2, "gave-up", 2)
    assert repo.git("show", f"{report['kept']}:more.txt") == "again\nagain"
    assert len((tmp_path / "runs").read_text()) == 3 * 2  # each red verdict is repeated once
    assert repo.state() == before


def test_green_base_needs_no_repair_and_no_agent(repo: Repository, tmp_path: Path) -> None:
    before, words = repo.state(), f"touch {tmp_path}/ran"
    result = repo.run("self-heal", "--json", "--gate", CHEAP_GATE, agent=words)
    report = result.report
    assert (result.status, report["outcome"], report["attempts"]) == (0, "already-green", [])
    assert repo.state() == before and not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------- baseline


def test_green_base_is_remembered_by_issue_to_pr_and_judged_anew_by_self_heal(
    repo: Repository, agent: Any, tmp_path: Path
) -> None:
    runs, words_of_agent = tmp_path / "runs", agent(ADD)
    runs.touch()

    def judged(*words: str) -> int:
        before = len(runs.read_text())
        gate = ("--gate", f"sh -c 'echo >> {runs}'", "--sandbox", "off")
        assert repo.run(*words, *gate, agent=words_of_agent).status == 0
        return len(runs.read_text()) - before

    issue = (*ISSUE, "--no-switch")
    assert judged(*issue, "--no-baseline") == 1  # the change
    assert judged(*issue) == 2  # the base, too
    assert judged(*issue) == 1
    assert judged("self-heal") == 1
    repo.write("calc.py", "def double(x):\n    return x + x\n")
    repo.commit()
    assert judged(*issue) == 2


# ----------------------------------------------------------------------------- branch, base, switch


def test_next_proposal_of_an_issue_gets_a_name_of_its_own(repo: Repository, agent: Any) -> None:
    words = (*ISSUE, *CHEAP, "--no-switch")
    first = repo.run(*words, agent=agent(ADD)).report
    second = repo.run(*words, agent=agent(ADD)).report
    assert (first["branch"], second["branch"]) == ("agent/issue", "agent/issue-2")
    assert repo.git("rev-parse", "agent/issue") == first["commit"]
    assert repo.git("rev-parse", "agent/issue-2^") == first["base"]
    assert any("agent/issue" in told and "open" in told for told in second["mentions"])
    assert repo.git("symbolic-ref", "HEAD") == "refs/heads/main"
    assert not (repo.path / "triple.py").exists()


@pytest.mark.parametrize("spelled", ["HEAD~1", ":/start", "HEAD~1..HEAD", "--all"])
def test_base_is_any_commit_as_git_spells_it(repo: Repository, agent: Any, spelled: str) -> None:
    old = repo.git("rev-parse", "HEAD")
    repo.commit("later")
    result = repo.run(*ISSUE, *CHEAP, f"--base={spelled}", agent=agent(ADD))
    if ".." in spelled or spelled.startswith("-"):
        assert result.status == 3 and "--base" in result.report["message"]
        return
    assert result.status == 0, result.err
    assert result.report["base"] == old == repo.git("rev-parse", "agent/issue^")
    assert repo.git("diff", "--name-only", old, "agent/issue") == "triple.py"


def test_run_on_an_unmerged_proposal_starts_where_that_one_started(
    repo: Repository, agent: Any
) -> None:
    start = repo.git("rev-parse", "main")
    assert repo.run(*ISSUE, *CHEAP, agent=agent(ADD)).status == 0
    assert repo.git("symbolic-ref", "HEAD") == "refs/heads/agent/issue"
    second = repo.run(*ISSUE, *CHEAP, agent=agent("open('other.txt', 'w').write('x')"))
    assert "unmerged proposal" in second.err and second.report["base"] == start
    repo.git("branch", "-f", "main", "agent/issue-2")  # merged: the next starts from it
    third = repo.run(*ISSUE, *CHEAP, agent=agent(ADD))
    assert "unmerged proposal" not in third.err
    assert third.report["base"] == second.report["commit"]


def test_dry_run_shows_the_brief_and_touches_nothing(repo: Repository, hermetic: Path) -> None:
    before = repo.state()
    result = repo.run(*ISSUE, "--dry-run", agent=f"touch {hermetic}/ran.md")
    assert result.status == 0 and "three times x" in result.out, result.err
    assert repo.state() == before and not list(hermetic.rglob("*.md"))
    assert not (repo.path / ".git/agent-runner").exists()


# -------------------------------------------------------------------------------------- outside Git


@pytest.fixture
def folder(repo: Repository) -> Repository:
    """The small app in a folder that is no repository."""
    shutil.rmtree(repo.path / ".git")
    repo.write("private.txt", "mine\n", mode=0o600)
    repo.write("d/x", "mine\n" * 20)
    (repo.path / "link").symlink_to("calc.py")
    return repo


def contents(folder: Path) -> dict[str, str]:
    """Each file's mode and content, a link's target."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or path.is_file():
            text = os.readlink(path) if path.is_symlink() else path.read_text("utf-8")
            found[path.relative_to(folder).as_posix()] = f"{path.lstat().st_mode:o} {text}"
    return found


@pytest.mark.parametrize(("command", "name"), [("issue-to-pr", "good"), ("self-heal", "stuck")])
def test_simulated_run_outside_git_leaves_demo_files_only_if_they_are_green(
    folder: Repository, command: str, name: str
) -> None:
    before = contents(folder.path)
    result = folder.run(*COMMANDS[command], "--simulate", name, "--gate", DEMO_GATE)
    assert result.status == COURSE[command][name] and "no Git repository" in result.out
    after = contents(folder.path)
    written = {file for file in DEMO if after.pop(file, "")}
    assert after == before and written == (set() if result.status else set(DEMO))


WRITTEN = {
    "edits": "echo '#' >> calc.py; rm d/x; mkdir new; echo x > new/x; chmod +x new/x; : > void",
    "moved": "mv test_calc.py 'to here'; mv d/x x",
    "folder to file": "rm -r d; echo x > d",
    "file to folder": "rm issue.md; mkdir issue.md; echo x > issue.md/x",
    "link": "ln -s calc.py new; rm link; echo x > link",
    "mode": "echo >> private.txt; chmod +x test_calc.py",
}


@pytest.mark.parametrize(
    ("name", "level"),
    [*((n, "off") for n in WRITTEN), pytest.param("edits", "require", marks=needs_bwrap)],
)
def test_green_change_outside_git_is_written_into_the_folder_as_the_agent_made_it(
    folder: Repository, tmp_path: Path, name: str, level: str
) -> None:
    shutil.copytree(folder.path, tmp_path / "twin", symlinks=True)
    agent = ["sh", "-ec", WRITTEN[name]]
    subprocess.run(agent, cwd=tmp_path / "twin", check=True)
    result = folder.run(*ISSUE, *CHEAP[:-1], level, agent=shlex.join(agent))
    assert (result.status, result.report["outcome"]) == (0, "proposed"), result.err
    assert result.report["branch"] is None and not (folder.path / ".git").exists()
    assert contents(folder.path) == contents(tmp_path / "twin")


def test_rejected_work_outside_git_changes_nothing_there_and_is_kept_as_a_patch(
    folder: Repository, agent: Any
) -> None:
    before = contents(folder.path)
    gate = ("--json", "--no-baseline", "--gate", f"{PYTHON} -c 'raise SystemExit(1)'")
    result = folder.run(*ISSUE, *gate, agent=agent(f"{ADD}\npathlib.Path('calc.py').unlink()"))
    assert (result.status, result.report["outcome"]) == (1, "rejected")
    assert contents(folder.path) == before
    folder.git("apply", str(Path(result.report["record"]) / "change.patch"))
    assert contents(folder.path).keys() == before.keys() - {"calc.py"} | {"triple.py"}


@pytest.mark.parametrize("name", ["d/x", "triple.py"])
def test_folder_that_was_edited_meanwhile_is_not_written(
    folder: Repository, agent: Any, name: str
) -> None:
    before, place = contents(folder.path), folder.path / name
    edit = "x = pathlib.Path('d/x'); x.write_text('new\\n' + x.read_text())"  # far from the other
    words = agent(f"{ADD}\n{edit}\nopen('{place}', 'a').write('theirs')")
    result = folder.run(*ISSUE, *CHEAP, agent=words)
    assert (result.status, result.report["outcome"]) == (1, "rejected"), result.err
    assert name in result.report["message"]
    assert contents(folder.path) == before | {name: before.get(name, "100644 ") + "theirs"}
