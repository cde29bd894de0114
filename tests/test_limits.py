"""A run always ends, and whatever the moment of its end, nothing of anybody's is lost."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import CHEAP_GATE, LEVELS, STARTER, Repository, Result, bwrap_works, heed_signals

ISSUE = ("issue-to-pr", "issue.md", "--no-baseline")
CHEAP = (*ISSUE, "--no-switch", "--gate", CHEAP_GATE)
KERNEL = ["off", "require"] if bwrap_works() else ["off"]
NEW = "open('new.py', 'w').write('NEW = 1\\n')"
needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# What every hostile program below starts with: work to keep, and children with a mark to find.
PRELUDE = """
import os, pathlib, signal, subprocess, sys, time

def child(**options):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-S", "-c", code, sys.argv[1]], **options)

def double_fork(**options):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            child(**options)
        os._exit(0)
    os.wait()

def hang():
    (pathlib.Path.home() / "ready").touch()
    while True:
        time.sleep(60)

def on_term(handler):
    signal.signal(signal.SIGTERM, handler)

with open("calc.py", "a") as file:
    file.write("\\n\\ndef triple(x):\\n    return x * 3\\n")
"""
CHILDREN = "child(); child(start_new_session=True); double_fork(); double_fork(env={}, cwd='/')\n"
DEAF = f"on_term(signal.SIG_IGN)\n{CHILDREN}{CHILDREN}hang()"
POLITE = "on_term(lambda *_: sys.exit(0)); child(start_new_session=True); hang()"
WORKS_ON = "child(start_new_session=True); hang()"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A temporary folder of the test's own, so that what a run leaves there is seen."""
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    yield
    for pid in running(tmp_path):
        os.kill(pid, signal.SIGKILL)


def marked(text: str, place: Path, agent: Any) -> str:
    """The command of a hostile program; the mark in it is that of the test."""
    command: str = agent(PRELUDE + text, arguments=f"{place}/mark")
    return command


def running(place: Path) -> list[int]:
    """Living processes of the test: its mark is in their command line or in their environment."""
    listing = subprocess.check_output(["ps", "axeww", "-o", "pid=,command="], text=True)
    lines = [line for line in listing.splitlines() if f"{place}/" in line]
    return [int(line.split()[0]) for line in lines if " ps axeww " not in line]


def left_behind(place: Path) -> list[Path]:
    """Folders of runs in the cache and in the temporary folder."""
    found = (*place.glob("home/.cache/agent-runner/*"), *place.glob("t/*/*"))
    return [path for path in found if path.is_dir()]


def start(repo: Repository, *words: str, output: Any, **env: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", STARTER, *words]
    options: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT}
    options |= {"preexec_fn": heed_signals}
    return subprocess.Popen(argv, cwd=repo.path, env=os.environ | env, **options)


def wait_until(child: subprocess.Popen[bytes], *told: str) -> None:
    """Wait until programs in it have told that they are ready, or have worked."""
    while not all(Path(os.environ["HOME"], name).exists() for name in told):
        assert child.poll() is None
        time.sleep(0.01)


def test_limits_end_agent_gate_and_setup_with_all_that_they_started(
    repo: Repository, agent: Any, tmp_path: Path
) -> None:
    """All of them at once, since they mostly wait: for the limit, and for the grace after it."""
    deaf, polite, ends = (marked(text, tmp_path, agent) for text in (DEAF, POLITE, CHILDREN))
    new, gate = agent(NEW), ("--gate", CHEAP_GATE)
    cases = [("setup", new, (*gate, "--setup", deaf, "--sandbox", "off"))]
    for level in KERNEL:
        for how, command in {"deaf": deaf, "polite": polite, "ends": ends}.items():
            cases.append((how, command, (*gate, "--sandbox", level)))
        cases.append(("gate", new, ("--gate", deaf, "--sandbox", level)))

    def run(case: tuple[str, str, tuple[str, ...]]) -> Result:
        limits = ("--agent-timeout", "0.7s", "--gate-timeout", "0.7s")
        return repo.run(*ISSUE, "--no-switch", "--json", *limits, *case[2], agent=case[1])

    with ThreadPoolExecutor(len(cases)) as pool:
        done = list(pool.map(run, cases))
    assert not running(tmp_path)
    assert not left_behind(tmp_path)
    outcomes = {"ends": "proposed", "gate": "rejected", "setup": "refused"}
    for (how, *_), result in zip(cases, done, strict=True):
        report = result.report
        assert report["outcome"] == outcomes.get(how, "agent-failed"), (how, result.err)
        assert how == "ends" or "limit" in report["message"], how
        if how in ("deaf", "polite"):
            assert report["attempts"][0]["timed_out"]
            assert "triple" in repo.git("show", f"{report['kept']}:calc.py")


# ------------------------------------------------------------------------------------------ output

FLOOD = f"""
import os, sys
for _ in range(5_000):
    os.write(1, (b"x" * 999 + b"\\n") * 10)
os.write(1, b"y" * 5_000_000)  # a line that does not end
print("\\nthe very end")
{NEW}
"""
MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[2:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest descendant, in kB
open(sys.argv[1], "w").write(str(peak))
sys.exit(status)
"""


@needs_proc
def test_flood_of_output_of_agent_and_gate_costs_neither_memory_nor_disk(
    repo: Repository, agent: Any, tmp_path: Path
) -> None:
    issue = repo.write("issue.md", "# Much\n\n" + "word " * 40_000)  # a brief that nobody reads
    peak, flood = tmp_path / "peak", agent(FLOOD)
    under = (sys.executable, "-S", "-c", MEASURED, str(peak))
    result = repo.run(*ISSUE, "--json", "--gate", flood, agent=flood, under=under)
    assert (result.status, result.report["outcome"]) == (0, "proposed"), result.err[-1000:]
    assert int(peak.read_text()) < 80_000
    record = Path(result.report["record"])
    log = (record / "agent-1.log").read_text()
    assert "left out" in log and log.endswith("the very end\n")
    kept = sum(file.stat().st_size for file in record.rglob("*") if file.is_file())
    assert (
        kept - 2 * issue.stat().st_size < 400_000
    )  # the issue is there by itself, and in the brief
    assert len(result.err) < 150_000


STREAMS = [
    '"$@" >&-',
    '"$@" --json <&-',
    '"$@" <&- >&- 2>&-',
    '"$@" | head -n 1',
    '"$@" --json | :',
]


@pytest.mark.parametrize("shell", STREAMS)
def test_closed_streams_and_a_reader_that_goes_away_end_no_run(
    repo: Repository, agent: Any, shell: str
) -> None:
    noisy = agent(f"print('line\\n' * 500)\n{NEW}")
    result = repo.run(*CHEAP, agent=noisy, under=("sh", "-c", shell, "sh"))
    assert result.status == 0 and "Traceback" not in result.err + result.out
    assert repo.git("diff", "--name-only", "main", "agent/issue") == "new.py"


# ----------------------------------------------------------------------------------------- signals

# A `git` that sends a signal to whoever started it, at the first command that contains $AT.
SIGNALLING_GIT = """\
#!/bin/sh
case "$*" in *"$AT"*) mkdir "$ONCE" 2>/dev/null && kill -s "$SIGNAL" "$PPID";; esac
exec "{git}" "$@"
"""


def put_first(place: Path, script: str) -> str:
    """A PATH on which `git` is a script of ours before it is Git."""
    (place / "bin").mkdir()
    (place / "bin/git").write_text(script.format(git=shutil.which("git")))
    (place / "bin/git").chmod(0o755)
    return f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"


# When a signal comes: while agent, gate or baseline is at work, or at one of our Git commands.
@pytest.mark.parametrize(
    ("moment", "names", "level"),
    [
        ("git rev-parse", "TERM", "off"),
        ("git read-tree", "INT", "off"),
        *(("agent", "HUP", level) for level in KERNEL),
        ("agent", "INT TERM", "off"),
        ("agent", "HUP HUP", "off"),
        *(("gate", "INT", level) for level in KERNEL),
        ("baseline", "TERM", KERNEL[-1]),
        ("git write-tree", "INT", "off"),
        ("git update-ref -m agent_runner", "TERM", "off"),
    ],
)
def test_a_signal_at_any_moment_ends_all_and_keeps_the_work(
    repo: Repository, agent: Any, tmp_path: Path, moment: str, names: str, level: str
) -> None:
    repo.write("calc.py", "def double(x):\n    return x + x\n")  # an edit that is not committed
    repo.write("notes.txt", "untracked")
    before, at_git = repo.state(), moment.partition("git ")[2]
    worked = "(pathlib.Path.home() / 'worked').touch()"
    command = marked(WORKS_ON if moment == "agent" else worked, tmp_path, agent)
    waits = moment in ("gate", "baseline")
    words = ("--gate", marked(WORKS_ON, tmp_path, agent) if waits else CHEAP_GATE)
    words += ("--sandbox", level, *(() if moment == "baseline" else ("--no-baseline",)))
    env = {"PATH": put_first(tmp_path, SIGNALLING_GIT), "ONCE": str(tmp_path / "once")}
    env |= {"AT": at_git or "never", "SIGNAL": names, "AGENT_CMD": command}
    child = start(repo, *ISSUE[:2], *words, output=subprocess.PIPE, **env)
    if not at_git:
        wait_until(child, "ready", *(["worked"] if waits else []))
        for name in names.split():
            child.send_signal(signal.Signals[f"SIG{name}"])
    shown = child.communicate(timeout=60)[0].decode()
    assert "Traceback" not in shown and "FAULT" not in shown
    assert not running(tmp_path)
    assert not left_behind(tmp_path)
    if "update-ref" in moment:  # made whole: what is said is true of the repository
        assert child.returncode == 0 and "PROPOSED" in shown, shown
        assert "triple" in repo.git("show", "agent/issue:calc.py")
        return
    assert child.returncode == 128 + signal.Signals[f"SIG{names.split()[0]}"], shown
    assert "INTERRUPTED" in shown
    assert repo.state() == before
    kept = repo.git("for-each-ref", "--format=%(refname)", "refs/agent-runner").split()
    assert len(kept) == (at_git not in ("rev-parse", "read-tree")), shown
    assert all(ref in shown and "triple" in repo.git("show", f"{ref}:calc.py") for ref in kept)


def test_signal_that_was_ignored_at_the_start_stays_ignored(repo: Repository, agent: Any) -> None:
    """As under nohup: the terminal may close."""
    hangs_up = agent(f"import os, signal\n{NEW}\nos.kill(os.getppid(), signal.SIGHUP)")
    under, words = ("sh", "-c", "trap '' HUP; exec \"$@\"", "sh"), (*CHEAP, "--sandbox", "off")
    assert repo.run(*words, agent=hangs_up, under=under).status == 0
    assert repo.run(*words, agent=hangs_up).status == 129


# ------------------------------------------------------------------------------------------- crash
# The program is killed at points spread over a whole run; whatever the moment, nothing is harmed.

KILLS = int(os.environ.get("AGENT_RUNNER_KILLS", "6"))
# A `git` that counts its calls, and at one of them kills whoever made it.
KILLING_GIT = """\
#!/bin/sh
printf x >> "$CALLS"
[ "$(wc -c < "$CALLS")" -eq "$KILL_AT" ] && kill -KILL "$PPID" && [ "$GOES_ON" = no ] && exit 1
exec "{git}" "$@"
"""
REMEDY = re.compile(
    r"(?:look at it: (git -C \S+) status; to remove it|To remove what it left): (rm -rf .+)"
)


def run_until(repo: Repository, agent: str, *, call: int = 10**6, after: float = 60.0) -> None:
    """A run that is killed at one of its Git calls, or after some seconds."""
    place = repo.path.parent
    env = {"CALLS": str(place / "calls"), "KILL_AT": str(call), "AGENT_CMD": agent}
    env |= {"GOES_ON": "no" if call % 3 else "yes", "PATH": put_first(place, KILLING_GIT)}
    words = ("issue-to-pr", "issue.md", "--gate", CHEAP_GATE)
    child = start(repo, *words, output=subprocess.DEVNULL, **env)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(after)
    child.kill()
    child.wait()
    while running(place):  # the Git command under way goes on
        time.sleep(0.02)


@needs_proc
@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment_nothing_is_harmed_and_the_next_run_says_what_is_left(
    repo: Repository, agent: Any, tmp_path: Path, number: int
) -> None:
    """A whole run makes some fifty-five Git calls, in half a second."""
    repo.write(".git/info/exclude", "ignored.txt\n")
    repo.write("ignored.txt", "ignored")
    repo.write("notes/untracked.txt", "untracked")
    before, main = repo.state() | {"refs": ""}, repo.git("rev-parse", "main")
    command, part = agent(f"{NEW}; open('calc.py', 'a').write('# more\\n')"), (number + 0.5) / KILLS
    if number % 2:
        run_until(repo, command, after=part * 0.5)
    else:
        run_until(repo, command, call=1 + int(part * 55))
    assert repo.git("fsck", "--no-dangling", "--no-progress") == ""
    assert not list((repo.path / ".git").rglob("*.lock"))
    refs = repo.git("for-each-ref", "--format=%(refname) %(parent)").splitlines()
    proposal = f"refs/heads/agent/issue {main}"  # whole, or not there
    assert {line.strip() for line in refs} <= {"refs/heads/main", proposal}
    assert proposal not in refs or repo.git("show", "agent/issue:new.py") == "NEW = 1"
    assert repo.git("rev-parse", "main") == main
    if repo.git("symbolic-ref", "HEAD") == "refs/heads/main":
        assert repo.state() | {"refs": ""} == before
    else:
        assert repo.git("status", "--porcelain") == "?? notes/"
    left = left_behind(tmp_path)
    result = repo.run(*CHEAP, agent=agent("open('other.py', 'w').write('')"))
    assert result.status == 0, result.out
    for look, remove in REMEDY.findall(result.out):
        look = [*shlex.split(look), "status"] if look else ["true"]
        assert subprocess.run(look, capture_output=True).returncode == 0
        subprocess.run(shlex.split(remove), check=True)
    assert not left_behind(tmp_path), left  # what is told is all that was left


@pytest.mark.parametrize("level", LEVELS)
def test_work_of_a_killed_run_is_where_the_next_run_says_and_a_living_run_is_let_be(
    repo: Repository, agent: Any, tmp_path: Path, level: str
) -> None:
    command = marked(WORKS_ON, tmp_path, agent)
    words = (*CHEAP, "--sandbox", level)
    child = start(repo, *words, output=subprocess.DEVNULL, AGENT_CMD=command)
    wait_until(child, "ready")
    beside = repo.run(*CHEAP, agent=agent(NEW))
    assert beside.status == 0 and "was killed" not in beside.out and child.poll() is None
    child.kill()
    child.wait()
    before = repo.state()
    result = repo.run(*CHEAP, agent=agent("print('nothing to do')"))
    assert result.status == 4 and repo.state() == before
    ((look, _),) = REMEDY.findall(result.out)
    assert "+def triple(x):" in subprocess.check_output([*shlex.split(look), "diff"], text=True)
    assert level == "off" or not running(tmp_path)
