"""The supervisor is killed with SIGKILL at points spread over whole runs; nothing may be harmed, whatever the moment.

Eight points in the everyday suite; AGENT_RUNNER_KILLS=48 or more spreads more of them, with a real pytest as the gate.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import PROGRAM, small_app

KILLS = int(os.environ.get("AGENT_RUNNER_KILLS", "8"))
CHECK = "import calc; assert calc.double(3) == 6"
GATE = f"{sys.executable} -m pytest -q test_calc.py" if KILLS > 8 else f'{sys.executable} -S -c "{CHECK}"'
PLANS = [("issue-to-pr", "auto"), ("self-heal", "off"), ("issue-to-pr", "off"), ("self-heal", "auto")]
PLANS = PLANS[: 4 if KILLS > 8 else 2]

# A `git` that counts its calls, and at one of them kills whoever made it: before the command, or as it starts.
KILLING_GIT = """\
#!/bin/sh
printf x >> "$CALLS"
if [ "$(wc -c < "$CALLS")" -ge "$KILL_AT" ]; then
    kill -KILL "$PPID"
    [ "$AFTERWARDS" = stop ] && exit 1
fi
exec "{git}" "$@"
"""
AGENT = """
import os, pathlib
pathlib.Path("calc.py").write_text("def double(x):\\n    return 2 * x\\n")
pathlib.Path("new.txt").write_text("new")
pathlib.Path(os.environ["WORKED"]).touch()
"""


class Point(NamedTuple):
    """Where a run is killed: at one of its Git calls, or so many seconds after its start."""

    call: int = 1_000_000
    seconds: float = 0.0
    afterwards: str = "go on"


class Place:
    """A repository with all kinds of files of the user's, and a cache of its own."""

    def __init__(self, path: Path, plan: tuple[str, str], agent: str) -> None:
        path.mkdir()
        self.path, self.plan, self.repo = path, plan, small_app(path / "app")
        self.repo.write(".gitignore", "ignored.txt\n")
        if plan[0] == "self-heal":
            self.repo.write("calc.py", "def double(x):\n    return x + 2\n")
        self.repo.commit("more")
        self.repo.write("ignored.txt", "ignored")
        self.repo.write("untracked/notes.txt", "untracked")
        if plan[0] == "self-heal":  # edits, staged and not, so that nothing may be switched
            self.repo.write("test_calc.py", "edited = True\n")
            self.repo.git("add", "test_calc.py")
            self.repo.write("issue.md", "edited")
        (path / "bin").mkdir()  # folders on PATH are read-only to the agent
        (path / "bin" / "git").write_text(KILLING_GIT.format(git=shutil.which("git")))
        (path / "bin" / "git").chmod(0o755)
        (path / "calls").touch()
        self.base = self.repo.git("rev-parse", "HEAD")
        self.env = os.environ | {"AGENT_CMD": agent, "XDG_CACHE_HOME": str(path / "cache")}
        self.env |= {"WORKED": str(path / "worked"), "CRASH_TEST": str(path)}
        self.before = self.user_state()

    def run(self, point: Point) -> int:
        """Run until the point, and wait for what the killed run left going."""
        command, sandbox = self.plan
        issue = ["issue.md"] if command == "issue-to-pr" else []
        argv = [sys.executable, str(PROGRAM), command, *issue, "--gate", GATE, "--sandbox", sandbox]
        path = f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        told = {"PATH": path, "CALLS": str(self.path / "calls"), "KILL_AT": str(point.call)}
        with open(self.path / "log", "a") as log:
            child = subprocess.Popen(
                argv, cwd=self.repo.path, env=self.env | told | {"AFTERWARDS": point.afterwards}, stdout=log, stderr=log
            )
        if point.seconds:
            time.sleep(point.seconds)
            child.send_signal(signal.SIGKILL)
        status = child.wait(60)
        while still_running(f"CRASH_TEST={self.path}"):
            time.sleep(0.05)
        return status

    def user_state(self) -> dict[str, str]:
        """What a run must leave as it was, or have switched as a whole."""
        return {key: value for key, value in self.repo.state().items() if key != "refs"}

    def refs(self, pattern: str) -> list[str]:
        return self.repo.git("for-each-ref", "--format=%(refname)", pattern).splitlines()

    def left_over(self) -> list[str]:
        return [path.name for path in (self.path / "cache" / "agent-runner").iterdir() if path.is_dir()]


def still_running(mark: str) -> bool:
    """Do processes live that carry a mark in their environment?"""
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if os.fsencode(mark) in file.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def check_killed(place: Place, point: Point, finished: Place) -> None:
    """Kill a run at a point; all must be as before, or hold the whole proposal, and the next run sees to the rest."""
    place.run(point)
    what = f"{place.plan} {point}\n{(place.path / 'log').read_text()}"
    assert place.repo.git("fsck", "--no-dangling", "--no-progress") == "", what
    assert place.user_state() in (place.before, finished.user_state()), what
    assert not list((place.repo.path / ".git").rglob("*.lock")), what
    branches = set(place.refs("refs/heads")) - {"refs/heads/main"}
    assert branches <= set(finished.refs("refs/heads")), what
    assert not place.refs("refs/tags") and not place.refs("refs/stash"), what
    assert place.repo.git("rev-parse", "main") == place.base, what
    (tree,) = {finished.repo.tree(ref) for ref in finished.refs("refs/heads/agent")}
    for ref in (*branches, *place.refs("refs/agent-runner")):
        assert place.repo.tree(ref) == tree, what
        assert place.repo.git("rev-parse", f"{ref}^") == place.base, what
    worked = (place.path / "worked").exists()
    assert place.run(Point()) == 0, what
    assert not place.left_over(), what
    kept = [*place.refs("refs/heads/agent"), *place.refs("refs/agent-runner")]
    assert [place.repo.tree(ref) for ref in kept] == [tree] * len(kept), what
    assert len(kept) >= 1 + worked, what


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_at_any_moment_nothing_is_harmed_and_the_work_is_recovered(tmp_path: Path, agent: Any) -> None:
    command, cases = agent(AGENT), []
    for number, plan in enumerate(PLANS):
        finished = Place(tmp_path / f"finished-{number}", plan, command)
        started = time.monotonic()
        assert finished.run(Point()) == 0, (finished.path / "log").read_text()
        seconds, calls = time.monotonic() - started, (finished.path / "calls").stat().st_size
        count = -(-KILLS // len(PLANS))
        for j in range(count):
            part = (j + 0.5) / count
            at_call = Point(1 + int(part * calls), afterwards="stop" if j % 4 else "go on")
            point = Point(seconds=part * seconds) if j % 2 else at_call
            cases.append((Place(tmp_path / f"{number}-{j}", plan, command), point, finished))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda case: check_killed(*case), cases))
