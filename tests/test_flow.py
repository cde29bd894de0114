"""The two commands end to end: simulated and real agents, the baseline, the branch, the options."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import agent_runner
from conftest import CHEAP_GATE, LEVELS, PROGRAM, ROOT, Repository, World, needs_bwrap, side_by_side

PYTHON = f"{shlex.quote(sys.executable)} -S"
DEMO = ["agent_demo.py", "test_agent_demo.py"]
# A gate that costs little and knows the demo's right answer, where there is a demo.
CHECK = "import agent_demo as demo; assert demo.apply_discount(200, 10) == 180"
DEMO_GATE = f"{PYTHON} -c \"import os; os.path.exists('agent_demo.py') and exec('{CHECK}')\""
FIX = 'import pathlib; pathlib.Path("calc.py").write_text("def double(x):\\n    return x * 2\\n")'
ADD = 'import pathlib; pathlib.Path("triple.py").write_text("def triple(x):\\n    return x * 3\\n")'
RIGHT_GATE = f'{PYTHON} -c "import calc; assert calc.double(3) == 6"'
POSIX = pytest.mark.skipif(os.name == "nt", reason="shell scripts")


def branches(repo: Repository) -> list[str]:
    return repo.git("for-each-ref", "--format=%(refname:short)", "refs/heads").split("\n")


def break_app(repo: Repository) -> Repository:
    """Commit a bug that the committed test shows."""
    repo.write("calc.py", "def double(x):\n    return x + 2\n")
    repo.commit("break it")
    return repo


def theirs(state: dict[str, str], *but: str) -> dict[str, str]:
    """A repository's state without some of it."""
    return {name: value for name, value in state.items() if name not in but}


# ------------------------------------------------------------------------------------- simulated agents


@pytest.mark.parametrize("edits", [False, True], ids=["new files", "edits"])
@side_by_side
def test_course_sequence_works_and_touches_nothing_that_is_not_committed(world: World, edits: bool) -> None:
    repo = world.repo
    repo.write(".gitignore", "*.log\n.env\n")
    repo.commit("ignore")
    program = shutil.copy(PROGRAM, repo.path / "agent_runner.py")
    for name in ("notes.txt", "deep/er/notes.txt", ".env", "build.log"):
        repo.write(name, f"mine: {name}\n")
    if edits:
        repo.write("calc.py", "def double(x):\n    return x * 2  # staged\n")
        repo.git("add", "calc.py")
        repo.write("calc.py", "def double(x):\n    return x * 2  # and edited\n")
        (repo.path / "test_calc.py").unlink()
    gate = ("--gate", DEMO_GATE, "--sandbox", "off") if edits else ()

    def run(*words: str) -> int:
        return repo.run(*words, *gate, program=Path(program)).status

    start = repo.state()
    assert run("issue-to-pr", "issue.md", "--simulate", "bad") == 1
    assert repo.state() == start and branches(repo) == ["main"]

    assert run("issue-to-pr", "issue.md", "--simulate", "good") == 0
    assert repo.git("log", "--format=%P %s", "main..agent/issue") == f"{repo.git('rev-parse', 'main')} Triple a number"
    assert repo.git("diff", "--name-status", "main", "agent/issue") == "\n".join(f"A\t{name}" for name in DEMO)
    assert repo.git("symbolic-ref", "HEAD") == f"refs/heads/{'main' if edits else 'agent/issue'}"
    assert theirs(repo.state(), "refs", "HEAD", "index", *DEMO) == theirs(start, "refs", "HEAD", "index")

    assert run("self-heal", "--simulate", "bad") == 0
    assert repo.git("diff", "--name-only", "agent/self-heal^", "agent/self-heal") == "agent_demo.py"
    assert branches(repo) == ["agent/issue", "agent/self-heal", "main"]

    healed = repo.state()
    assert run("self-heal", "--simulate", "stuck") == 2
    assert repo.state() == healed
    same = ("refs",) if edits else ("refs", "HEAD", "index", *DEMO)
    assert theirs(healed, *same) == theirs(start, *same)


VARIANTS = [
    ("issue-to-pr", "hang", 4, "agent-failed", CHEAP_GATE),
    ("issue-to-pr", "idle", 4, "agent-failed", CHEAP_GATE),
    ("issue-to-pr", "cheat", 1, "rejected", CHEAP_GATE),
    ("issue-to-pr", "escape", 0, "proposed", CHEAP_GATE),
    ("self-heal", "cheat", 2, "gave-up", DEMO_GATE),
    ("self-heal", "escape", 0, "proposed", DEMO_GATE),
    ("self-heal", "flaky", 2, "gave-up", "pytest -q"),
]


@pytest.mark.parametrize(("command", "name", "status", "outcome_word", "gate"), VARIANTS)
@side_by_side
def test_simulated_variant_ends_as_documented(
    world: World, command: str, name: str, status: int, outcome_word: str, gate: str
) -> None:
    repo, before = world.repo, world.repo.state()
    issue = ("issue.md", "--no-baseline") if command == "issue-to-pr" else ()
    limit = ("--agent-timeout", "0.5") if name == "hang" else ()
    result = repo.run(command, *issue, *limit, "--simulate", name, "--json", "--gate", gate)
    assert (result.status, result.report["outcome"]) == (status, outcome_word), result.out + result.err
    if outcome_word == "proposed":
        assert len(branches(repo)) == 2 and repo.git("rev-parse", "main") in before["refs"]
    else:
        assert repo.state() == before
    if name == "flaky":
        assert result.report["attempts"] == [] and "test_that_fails_the_first_time_only" in result.report["message"]
    if name == "cheat":
        assert any(finding["severity"] == "rejects" for finding in result.report["findings"])


def test_every_variant_has_its_case() -> None:
    every = {(command, name) for command, names in agent_runner.VARIANTS.items() for name in names}
    course = {("issue-to-pr", "good"), ("issue-to-pr", "bad"), ("self-heal", "bad"), ("self-heal", "stuck")}
    assert course | {case[:2] for case in VARIANTS} == every


# ------------------------------------------------------------------------------------------- real input


@POSIX
@pytest.mark.parametrize("level", LEVELS)
@side_by_side
def test_self_heal_by_a_shell_script_proposes_exactly_the_judged_tree(world: World, level: str) -> None:
    broken = break_app(world.repo)
    words = world.agent(
        """
        #!/bin/sh
        grep -q 'assert double(3) == 6' $1 || exit 9
        printf 'def double(x):\\n    return x * 2\\n' > calc.py
        echo new > 'new file.txt'
        """
    )
    given = f"{words} {{prompt_file}}" if level == "off" else words  # else on standard input
    tell_tree = f"{PYTHON} -c \"import os; os.system('git add -A; git write-tree')\""
    gate = ("--gate", "pytest -q -p no:cacheprovider", "--gate", tell_tree)
    result = broken.run("self-heal", "--json", *gate, "--sandbox", level, agent=given)
    report = result.report
    assert (result.status, report["branch"]) == (0, "agent/self-heal"), result.err
    tree, log = broken.tree("agent/self-heal"), f"gate-1-{Path(sys.executable).name}.log"
    assert tree == report["tree"] == (broken.path / report["record"] / log).read_text().strip()
    assert broken.git("diff", "--name-only", "main", "agent/self-heal") == "calc.py\nnew file.txt"
    assert (
        broken.git("log", "--format=%s %ae", "main..agent/self-heal") == "Mend the failing checks ada@example.invalid"
    )


TODO_AGENT = '''
import pathlib, sys
assert "todo.py delete <index>" in pathlib.Path(sys.argv[1]).read_text()
todo = pathlib.Path("todo.py")
text = todo.read_text()
text = text.replace("def build_parser", """def delete_entry(path: Path, index: int) -> int:
    entries = load(path)
    if not 1 <= index <= len(entries):
        print(f"there is no entry {index}", file=sys.stderr)
        return 1
    save(path, entries[: index - 1] + entries[index:])
    return 0


def build_parser""")
text = text.replace('    commands.add_parser("list"', """    delete = commands.add_parser("delete", help="remove one")
    delete.add_argument("index", type=int)
    commands.add_parser("list\\"""")
text = text.replace("    return list_entries", """    if args.command == "delete":
        return delete_entry(args.file, args.index)
    return list_entries""")
todo.write_text(text.replace("import os\\n", "import os\\nimport sys\\n"))
pathlib.Path("test_delete.py").write_text("""import pytest

from todo import main


@pytest.mark.parametrize(("index", "left"), [(1, "bc"), (2, "ac"), (3, "ab"), (0, "abc"), (4, "abc")])
def test_delete(tmp_path, capsys, index, left):
    file = ["--file", str(tmp_path / "todo.json")]
    for text in "abc":
        main([*file, "add", text])
    assert main([*file, "delete", str(index)]) == (left == "abc")
    main([*file, "list"])
    assert capsys.readouterr().out == "".join(f"{n}. {text}\\\\n" for n, text in enumerate(left, 1))
""")
'''


@side_by_side
def test_sample_issue_against_the_todo_app_ends_in_a_proposal_with_proof(world: World) -> None:
    tmp_path = world.path
    repo = Repository(tmp_path / "todo app")
    shutil.copytree(ROOT / "tests" / "todo_app", repo.path, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copytree(ROOT / "issues", repo.path / "issues")
    repo.git("init", "-q", "-b", "main")
    repo.git("config", "user.name", "Ada")
    repo.git("config", "user.email", "ada@example.invalid")
    repo.commit("start")
    result = repo.run(
        "issue-to-pr", "issues/issue-delete-command.md", "--json", agent=world.agent(TODO_AGENT) + " {prompt_file}"
    )
    report = result.report
    assert result.status == 0, result.err
    assert repo.tree(report["branch"]) == report["tree"]
    assert report["branch"] == "agent/issue-delete-command"
    assert repo.git("diff", "--name-only", "main", report["branch"]) == "test_delete.py\ntodo.py"
    assert report["gate"][1]["tests_passed"] == 4 + 5
    assert len(report["proof"]["new_on_old"]) == 5 and "passed" not in report["proof"]["new_on_old"].values()
    assert repo.git("log", "-1", "--format=%s") == "Add a delete command to the to-do app"


# ------------------------------------------------------------------------------------ self-heal's attempts


@side_by_side
def test_repair_stops_at_the_cap_and_hands_over(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    runs = tmp_path / "runs"
    words = world.agent("open('more.txt', 'a').write('again\\n')")
    before = repo.state()
    result = repo.run("self-heal", "--json", "--gate", counting(runs, status=1), "--sandbox", "off", agent=words)
    report = result.report
    assert (result.status, report["outcome"]) == (2, "gave-up")
    assert len(report["attempts"]) == agent_runner.RETRY_CAP == 2
    assert len(runs.read_text()) == 1 + 1 + 2  # the base, once more against flakiness, and each repair
    assert repo.git("show", f"{report['kept']}:more.txt") == "again\nagain"
    assert repo.state() == before


def counting(file: Path, *, status: int = 0) -> str:
    """A gate command that notes each of its runs in a file outside."""
    return f"{PYTHON} -c \"import sys; open('{file}', 'a').write('x'); sys.exit({status})\""


@side_by_side
def test_repair_that_changes_nothing_uses_up_an_attempt(world: World) -> None:
    broken = break_app(world.repo)
    tmp_path = world.path
    words = world.agent(f"import os\nmark = '{tmp_path}/mark'\nif os.path.exists(mark): {FIX}\nopen(mark, 'w')")
    report = broken.run("self-heal", "--json", "--gate", RIGHT_GATE, "--sandbox", "off", agent=words).report
    assert (report["outcome"], len(report["attempts"])) == ("proposed", 2)
    assert report["attempts"][0]["gate"] is None


@side_by_side
def test_green_base_needs_no_repair_and_no_agent(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    before = repo.state()
    result = repo.run("self-heal", "--json", "--gate", CHEAP_GATE, agent=f"touch {tmp_path}/ran")
    assert (result.status, result.report["outcome"], result.report["attempts"]) == (0, "already-green", [])
    assert repo.state() == before and not (tmp_path / "ran").exists()


@POSIX
@side_by_side
def test_failure_that_does_not_reproduce_is_handed_over_and_spends_no_agent(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    gate = f"sh -c 'test -e {tmp_path}/seen || {{ touch {tmp_path}/seen; exit 1; }}'"
    result = repo.run("self-heal", "--json", "--gate", gate, agent=f"touch {tmp_path}/ran")
    assert (result.status, result.report["outcome"], result.report["attempts"]) == (2, "gave-up", [])
    assert "flaky" in result.report["message"] and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["issue-to-pr", "self-heal"])
@side_by_side
def test_agent_that_fails_ends_the_run_and_its_work_is_kept(world: World, command: str) -> None:
    repo = break_app(world.repo)
    before = repo.state()
    words = (command, *(("issue.md", "--no-baseline") if command == "issue-to-pr" else ()), "--attempts", "3", "--json")
    result = repo.run(*words, "--gate", RIGHT_GATE, agent=world.agent(f"{FIX}\nraise SystemExit(7)"))
    report = result.report
    assert (result.status, report["outcome"], report["branch"]) == (4, "agent-failed", None)
    assert [attempt["agent_status"] for attempt in report["attempts"]] == [7]
    assert "return x * 2" in repo.git("show", f"{report['kept']}:calc.py")
    assert repo.state() == before


# -------------------------------------------------------------------------------------------- the baseline


@side_by_side
def test_red_base_ends_the_run_and_keeps_the_stopped_agents_work(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    words = world.agent(f"{ADD}\nopen('{tmp_path}/wrote', 'w')\nimport time; time.sleep(600)")
    wait = f"import os, time\nwhile not os.path.exists('{tmp_path}/wrote'): time.sleep(0.01)\nraise SystemExit(1)"
    (tmp_path / "wait.py").write_text(wait)
    before = repo.state()
    result = repo.run("issue-to-pr", "issue.md", "--json", "--gate", f"{PYTHON} {tmp_path}/wait.py", agent=words)
    report = result.report
    assert (result.status, report["outcome"], report["branch"]) == (3, "refused", None)
    assert "the base is red" in report["message"] and "self-heal" in report["message"]
    assert "def triple" in repo.git("show", f"{report['kept']}:triple.py")
    assert repo.state() == before


@side_by_side
def test_base_without_tests_is_not_red_but_a_change_without_them_is(world: World) -> None:
    repo = world.repo
    repo.git("rm", "-q", "test_calc.py")
    repo.commit("no tests")
    words = ("issue-to-pr", "issue.md", "--gate", "pytest -q", "--json")
    report = repo.run(*words, agent=world.agent(ADD)).report
    assert (report["outcome"], report["gate"][0]["reason"]) == ("rejected", "no tests were collected")
    more = (
        ADD
        + '; pathlib.Path("test_triple.py").write_text("import triple\\ndef test(): assert triple.triple(2) == 6\\n")'
    )
    assert repo.run(*words, agent=world.agent(more)).report["outcome"] == "proposed"


@side_by_side
def test_green_base_is_remembered_by_issue_to_pr_and_judged_anew_by_self_heal(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    runs = tmp_path / "runs"
    runs.touch()
    words_of_agent = world.agent(ADD)

    def added(*words: str) -> int:
        before = len(runs.read_text())
        assert repo.run(*words, "--gate", counting(runs), "--sandbox", "off", agent=words_of_agent).status == 0
        return len(runs.read_text()) - before

    issue = ("issue-to-pr", "issue.md", "--no-switch")
    assert added(*issue) == 2  # the base and the change
    assert added(*issue) == 1
    assert added("self-heal") == 1
    repo.write("calc.py", "def double(x):\n    return x + x\n")
    repo.commit()
    assert added(*issue) == 2
    assert added(*issue, "--no-baseline", "--base", "HEAD~1", "--setup", CHEAP_GATE) == 1


# -------------------------------------------------------------------------------------------- the options


@side_by_side
def test_all_gate_commands_run_in_their_order(world: World) -> None:
    repo = world.repo
    gates = [
        f"{PYTHON} -c \"print('{word}'); raise SystemExit({n})\"" for n, word in enumerate(("one", "two", "three"))
    ]
    words = [word for gate in gates for word in ("--gate", gate)]
    result = repo.run("issue-to-pr", "issue.md", "--no-baseline", *words, agent=world.agent(ADD))
    assert result.status == 1
    ending = result.out.partition("REJECTED")[2]
    places = [ending.index(part) for part in ("is red: exit status 1", "│ two", "is red: exit status 2", "│ three")]
    assert places == sorted(places) and "│ one" not in result.out


@side_by_side
def test_base_option_starts_at_that_commit(world: World) -> None:
    repo = world.repo
    old = repo.git("rev-parse", "HEAD")
    repo.write("later.py", "later = 1\n")
    repo.commit("later")
    result = repo.run(
        "issue-to-pr", "issue.md", "--no-baseline", "--base", "HEAD~1", "--gate", CHEAP_GATE, agent=world.agent(ADD)
    )
    assert result.status == 0 and repo.git("rev-parse", "agent/issue^") == old
    assert repo.git("diff", "--name-only", old, "agent/issue") == "triple.py"


@POSIX
@pytest.mark.parametrize("level", LEVELS)
@side_by_side
def test_setup_prepares_each_clone_and_is_no_part_of_the_change(world: World, level: str) -> None:
    repo = world.repo
    setup = "sh -c 'mkdir tools; printf \"#!/bin/sh\\ntest -e triple.py\" > tools/check; chmod +x tools/check'"
    words = ("issue-to-pr", "issue.md", "--no-baseline", "--setup", setup, "--gate", "tools/check", "--sandbox", level)
    result = repo.run(*words, agent=world.agent(f"import os; assert os.path.exists('tools/check')\n{ADD}"))
    assert result.status == 0, result.out
    assert repo.git("diff", "--name-only", "main", "agent/issue") == "triple.py"
    assert not (repo.path / "tools").exists()


@side_by_side
def test_setup_that_fails_is_refused_before_the_agent(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    before = repo.state()
    setup = f"{PYTHON} -c \"raise SystemExit('no network')\""
    words = ("issue-to-pr", "issue.md", "--gate", CHEAP_GATE, "--setup", setup)
    result = repo.run(*words, agent=f"touch {tmp_path}/ran")
    assert result.status == 3 and "no network" in result.out
    assert repo.state() == before and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("level", LEVELS)
@side_by_side
def test_tool_that_is_missing_when_the_gate_runs_is_red(world: World, level: str) -> None:
    repo = world.repo
    words = ("--setup", CHEAP_GATE, "--gate", "no-such-tool -q", "--no-baseline", "--sandbox", level)
    result = repo.run("issue-to-pr", "issue.md", *words, agent=world.agent(ADD))
    assert result.status == 1 and "no-such-tool cannot be found or started" in result.out
    assert branches(repo) == ["main"]


@side_by_side
def test_gate_tools_are_found_beside_the_interpreter_without_activation(world: World) -> None:
    bare = os.pathsep.join((os.path.dirname(shutil.which("git") or ""), os.defpath))
    words = ("issue-to-pr", "issue.md", "--simulate", "good", "--no-baseline", "--gate", "pytest -q test_agent_demo.py")
    assert world.repo.run(*words, env={"PATH": bare}).status == 0


@side_by_side
def test_carried_file_is_there_and_is_never_proposed_or_changed(world: World) -> None:
    repo = world.repo
    repo.write(".gitignore", ".env\ncache/\n")
    repo.commit()
    repo.write(".env", "KEY=1\n")
    repo.write("cache/deep/file", "warm\n")
    check = f"{PYTHON} -c \"assert open('.env').read() == 'KEY=1\\n' and open('cache/deep/file').read()\""
    words = ("--carry", ".env", "--carry", "cache", "--gate", check, "--json")
    result = repo.run(
        "issue-to-pr", "issue.md", *words, agent=world.agent(f"{ADD}; open('.env', 'a').write('KEY=2\\n')")
    )
    assert result.status == 0, result.err
    assert repo.git("diff", "--name-only", "main", "agent/issue") == "triple.py"
    assert (repo.path / ".env").read_text() == "KEY=1\n"


def test_version_is_printed() -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"agent_runner {agent_runner.__version__}\n")


# ---------------------------------------------------------------------------------- the branch and the switch


@side_by_side
def test_existing_branch_is_never_moved(world: World) -> None:
    repo = world.repo
    for name in ("agent/issue", "agent/issue-2", "agent/issue-3/mine"):
        repo.git("branch", name)
    before = repo.state()
    result = repo.run("issue-to-pr", "issue.md", "--gate", CHEAP_GATE, "--no-switch", agent=world.agent(ADD))
    assert result.status == 0 and repo.git("rev-parse", "agent/issue-4^") == repo.git("rev-parse", "main")
    repo.git("branch", "-q", "-D", "agent/issue-4")
    assert repo.state() == before


@side_by_side
def test_run_on_an_unmerged_proposal_starts_where_that_started(world: World) -> None:
    repo = world.repo
    start = repo.git("rev-parse", "main")
    words = ("--gate", CHEAP_GATE, "--no-baseline")
    assert repo.run("issue-to-pr", "issue.md", *words, agent=world.agent(ADD)).status == 0
    assert repo.git("symbolic-ref", "HEAD") == "refs/heads/agent/issue"
    repo.write("other.md", "# Another\n")
    other = world.agent("open('other.txt', 'w').write('x')")
    result = repo.run("issue-to-pr", "other.md", *words, agent=other)
    assert "HEAD is on an unmerged proposal" in result.out
    assert repo.git("rev-parse", "agent/other^") == start
    repo.git("branch", "-f", "main", "agent/other")  # merged: from now on it is what everything starts from
    result = repo.run("issue-to-pr", "other.md", *words, agent=world.agent(ADD))
    assert "HEAD is on an unmerged proposal" not in result.out
    assert repo.git("rev-parse", "agent/other-2^") == repo.git("rev-parse", "main")


@pytest.mark.parametrize(
    "name", ["triple.py", "pkg", "settings.ini"], ids=["untracked", "a file for a folder", "ignored"]
)
@side_by_side
def test_switch_never_overwrites_a_file_that_git_does_not_hold(world: World, name: str) -> None:
    repo = world.repo
    repo.write(".gitignore", "settings.ini\n")
    repo.commit()
    repo.write(name, "mine\n")
    before = repo.state()
    words = world.agent(
        f"{ADD}\nimport os; os.mkdir('pkg'); os.remove('.gitignore')\n"
        "for name in ('pkg/a.py', 'settings.ini'): open(name, 'w')"
    )
    result = repo.run("issue-to-pr", "issue.md", "--gate", CHEAP_GATE, agent=words)
    assert result.status == 0 and "HEAD was left where it is" in result.out
    assert repo.git("diff", "--name-only", "main", "agent/issue").split() == [
        ".gitignore", "pkg/a.py", "settings.ini", "triple.py"
    ]  # fmt: skip
    assert theirs(repo.state(), "refs") == theirs(before, "refs")


def meanwhile(repo: Repository, tmp_path: Path, act: Callable[[], object], *options: str) -> str:
    """What a run prints during whose agent the user does something."""
    go = tmp_path / "go"
    wait = f"import os, time\nwhile not os.path.exists('{go}'): time.sleep(0.01)\n{ADD}"
    (tmp_path / "waits.py").write_text(f"print('here', flush=True)\n{wait}")
    words = ("issue-to-pr", "issue.md", "--gate", CHEAP_GATE, "--no-baseline", *options)
    environ = os.environ | {"AGENT_CMD": f"{PYTHON} {tmp_path}/waits.py", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), *words], cwd=repo.path, env=environ, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        shown = [next(line for line in process.stdout if "│ here" in line)]
        act()
        go.touch()
        shown += process.stdout
    assert process.returncode == 0, shown
    return "".join(shown)


@side_by_side
def test_checkout_that_is_edited_during_the_run_is_not_switched(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    before = repo.state()
    shown = meanwhile(repo, tmp_path, lambda: repo.write("calc.py", "mine = 1\n"), "--sandbox", "off")
    assert "HEAD stays where it is" in shown and "uncommitted changes" in shown
    assert theirs(repo.state(), "refs", "calc.py") == theirs(before, "refs", "calc.py")
    assert repo.git("diff", "--name-only", "main", "agent/issue") == "triple.py"


@needs_bwrap
@side_by_side
def test_head_that_moved_during_the_run_is_not_switched(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    start = repo.git("rev-parse", "main")
    shown = meanwhile(repo, tmp_path, lambda: repo.commit("mine"))
    assert "it moved during the run" in shown
    assert repo.git("rev-parse", "agent/issue^") == start
    assert (
        repo.git("log", "--format=%s", "-1", "HEAD") == "mine" and repo.git("symbolic-ref", "HEAD") == "refs/heads/main"
    )


# ------------------------------------------------------------------------------------------ outside Git


def outside_git(repo: Repository) -> Path:
    """The small app in a folder that is no repository."""
    shutil.rmtree(repo.path / ".git")
    return repo.path


def files(folder: Path) -> dict[str, bytes]:
    hidden = ("__pycache__", ".pytest_cache", ".ruff_cache")
    found = (path for path in folder.rglob("*") if path.is_file() and not set(path.parts) & set(hidden))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize(
    ("words", "status", "stays"),
    [
        (("issue-to-pr", "issue.md", "--simulate", "good"), 0, True),
        (("issue-to-pr", "issue.md", "--simulate", "bad"), 1, False),
        (("self-heal", "--simulate", "bad"), 0, True),
        (("self-heal", "--simulate", "stuck"), 2, False),
        (("self-heal", "--simulate", "stuck", "--dry-run"), 0, False),
        (("self-heal", "--simulate", "stuck", "--setup", f"{PYTHON} -c 'raise SystemExit(1)'"), 3, False),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else "",
)
@side_by_side
def test_simulated_run_outside_git_leaves_demo_files_only_if_they_are_green(
    world: World, words: tuple[str, ...], status: int, stays: bool
) -> None:
    folder = outside_git(world.repo)
    before = files(folder)
    result = Repository(folder).run(*words, "--gate", DEMO_GATE)
    assert result.status == status, result.out
    after = files(folder)
    assert {name: after.pop(name) for name in DEMO if name in after}.keys() == (set(DEMO) if stays else set())
    assert after == before
    assert "this folder is no Git repository" in result.out


@side_by_side
def test_demo_files_of_the_users_own_are_put_back_outside_git_after_a_kill_too(world: World) -> None:
    folder = outside_git(world.repo)
    (folder / "agent_demo.py").write_text("mine = 1\n")
    environ = os.environ | {"XDG_CACHE_HOME": str(world.path / "cache")}
    wait = f"{PYTHON} -c 'import time; time.sleep(60)'"
    words = [sys.executable, str(PROGRAM), "self-heal", "--simulate", "stuck", "--gate", wait]
    with subprocess.Popen(words, cwd=folder, env=environ, stdout=subprocess.DEVNULL) as killed:
        while "mine" in (folder / "agent_demo.py").read_text():
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    result = Repository(folder).run(
        "self-heal", "--simulate", "stuck", "--gate", DEMO_GATE, env={"XDG_CACHE_HOME": str(world.path / "cache")}
    )
    assert result.status == 2 and (folder / "agent_demo.py").read_text() == "mine = 1\n", result.out


@side_by_side
def test_demo_files_of_the_users_own_are_put_back_outside_git(world: World) -> None:
    folder = outside_git(world.repo)
    for name in DEMO:
        (folder / name).write_text("mine = 1\n")
    before = files(folder)
    for words in (("issue-to-pr", "issue.md", "--simulate", "bad"), ("self-heal", "--simulate", "stuck")):
        result = Repository(folder).run(*words, "--no-baseline", "--gate", f"{PYTHON} -c 'import agent_demo; {CHECK}'")
        assert result.status in (1, 2), result.out
        assert files(folder) == before


@pytest.mark.parametrize("level", LEVELS)
@side_by_side
def test_real_agent_outside_git_works_in_the_folder_itself(world: World, level: str) -> None:
    folder = outside_git(world.repo)
    (folder / "calc.py").write_text("def double(x):\n    return x + 2\n")
    result = Repository(folder).run(
        "self-heal", "--json", "--gate", RIGHT_GATE, "--sandbox", level, agent=world.agent(FIX)
    )
    report = result.report
    assert (result.status, report["outcome"], report["branch"]) == (0, "proposed", None), result.err
    assert "no branch to propose from" in report["message"]
    assert (folder / "calc.py").read_text() == "def double(x):\n    return x * 2\n"
    assert "--- a/calc.py" in (Path(report["record"]) / "change.patch").read_text()
    assert not (folder / ".git").exists()
