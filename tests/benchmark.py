"""What the supervision costs on this machine: python tests/benchmark.py [--quick]

Prints a table of medians with the aim of each row: whole runs beside their bare gate, the time
until the agent starts (beside `git worktree add`), and the supervisor's memory. Everything happens
in a temporary folder, with a HOME of its own. ruff and pytest must be on PATH.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

PROGRAM = Path(__file__).resolve().parent.parent / "agent_runner.py"
STAMP = "import sys, time; open(sys.argv[1], 'a').write(f'{time.time()}\\n')"
PEAK = """
import atexit, re, runpy, sys
file = sys.argv[1]
del sys.argv[:2]
status = lambda: open("/proc/self/status").read()
atexit.register(lambda: open(file, "w").write(re.search(r"VmHWM:\\s+(\\d+) kB", status())[1]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Bench:
    """A folder to measure in, and the rows of the table."""

    def __init__(self, folder: Path, *, sandbox: str, rounds: int) -> None:
        self.folder, self.sandbox, self.rounds = folder, sandbox, rounds
        self.home = folder / "home"
        self.home.mkdir()
        odd = ("GIT_", "AGENT_", "XDG_", "PYTHON")
        keep = {k: v for k, v in os.environ.items() if not k.startswith(odd)}
        self.env = keep | {"HOME": str(self.home), "GIT_CONFIG_NOSYSTEM": "1", "NO_COLOR": "1"}
        self.env["PATH"] = os.pathsep.join((os.path.dirname(sys.executable), self.env["PATH"]))

    def call(self, *words: str | Path, cwd: Path, env: dict[str, str] | None = None) -> float:
        """Run a command; its wall-clock time in seconds."""
        started = time.perf_counter()
        done = subprocess.run(words, cwd=cwd, env=self.env | (env or {}), capture_output=True)
        seconds = time.perf_counter() - started
        if done.returncode != 0:
            said = (done.stdout + done.stderr).decode()
            raise SystemExit(f"{shlex.join(map(str, words))} failed:\n{said}")
        return seconds

    def run(
        self, repo: Path, *words: str, agent: str = "", before: Sequence[str | Path] = ()
    ) -> float:
        """One run of the program, on a repository that is as before once it is over."""
        options = ("issue-to-pr", "issue.md", "--no-switch", "--sandbox", self.sandbox)
        call = (sys.executable, *before, PROGRAM, *options, *words)
        seconds = self.call(*call, cwd=repo, env={"AGENT_CMD": agent})
        self.call("git", "branch", "-q", "-D", "agent/issue", cwd=repo)
        return seconds

    def repository(self, files: int) -> Path:
        """A repository with a passing test and so many files of a kilobyte, a hundred a folder."""
        path = self.folder / f"repo-{files}"
        if path.is_dir():
            return path
        path.mkdir()
        (path / "calc.py").write_text("def double(x):\n    return x * 2\n")
        test = "from calc import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
        (path / "test_calc.py").write_text(test)
        (path / "issue.md").write_text("# Triple a number\n\n`triple(x)` returns three times x.\n")
        for number in range(files):
            file = path / f"data/{number // 10_000}/{number // 100}/{number}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{number}\n" * 150)
        self.call("git", "init", "-q", "-b", "main", cwd=path)
        self.call("git", "config", "user.name", "Ada", cwd=path)
        self.call("git", "config", "user.email", "ada@x.invalid", cwd=path)
        self.commit(path)
        return path

    def commit(self, repo: Path) -> None:
        self.call("git", "add", "-A", cwd=repo)
        self.call("git", "commit", "-q", "-m", "as it is", cwd=repo)


def bare_gate(bench: Bench, repo: Path) -> float:
    return sum(bench.call(*w.split(), cwd=repo) for w in ("ruff check .", "pytest -q"))


def beside_bare_gate(bench: Bench) -> list[list[str]]:
    """A whole run of a small repository beside `ruff check .` and `pytest -q` by hand, in turns."""
    repo, bare, ours = bench.repository(0), [], []
    bench.run(repo, "--simulate", "good")  # remembers the baseline
    for _ in range(bench.rounds):
        bare.append(bare_gate(bench, repo))
        ours.append(bench.run(repo, "--simulate", "good"))
    return [row("run / bare gate, small repository", median(ours), median(bare), "2.0")]


def beside_long_gate(bench: Bench) -> list[list[str]]:
    """The same with a gate of ten seconds: a change of code, and a change of code and its test."""
    repo, rows = bench.repository(0), []
    (repo / "test_long.py").write_text("import time\n\n\ndef test_long():\n    time.sleep(10)\n")
    bench.commit(repo)
    code = "open('calc.py', 'a').write('\\n\\ndef triple(x):\\n    return x * 3\\n')"
    more = "\\n\\ndef test_more():\\n    assert double(4) == 8\\n"
    test = f"open('test_calc.py', 'a').write('{more}')"
    bench.run(repo, agent=shlex.join([sys.executable, "-S", "-c", code]))
    cases = [("", code, "1.03"), (", with a change to tests", f"{code};{test}", "1.15")]
    for name, text, aim in cases:
        bare, ours = [], []
        for _ in range(max(1, bench.rounds // 5)):
            bare.append(bare_gate(bench, repo))
            ours.append(bench.run(repo, agent=shlex.join([sys.executable, "-S", "-c", text])))
        rows.append(row(f"run / gate of ten seconds{name}", median(ours), median(bare), aim))
    bench.call("git", "reset", "-q", "--hard", "HEAD^", cwd=repo)
    return rows


def until_the_agent_starts(bench: Bench, files: int) -> list[list[str]]:
    """From the start of the run to the start of the agent, beside `git worktree add`."""
    repo, stamps, tree = bench.repository(files), bench.folder / "stamps", bench.folder / "tree"
    edit = f"{STAMP}\nopen('calc.py', 'a').write('# a line\\n')"
    agent = shlex.join([sys.executable, "-S", "-c", edit, str(stamps)])
    added, started = [], []
    for _ in range(max(3, bench.rounds // 3)):
        words = ("git", "worktree", "add", "-q", "--detach", tree)
        added.append(bench.call(*words, cwd=repo))
        bench.call("git", "worktree", "remove", "--force", tree, cwd=repo)
        stamps.unlink(missing_ok=True)
        begun = time.time()
        bench.run(repo, "--no-baseline", "--gate", "true", agent=agent)
        started.append(float(stamps.read_text()) - begun)
    name = f"until the agent starts / worktree add, {files:,} files"
    aim = "0.15 s" if files < 1000 else "0.4"
    return [row(name, median(started), median(added), aim)]


def memory_in_a_flood(bench: Bench) -> list[list[str]]:
    """Peak memory of the supervisor while the agent prints a gigabyte."""
    text = "import os\nfor _ in range(16_000): os.write(1, b'x' * 62_499 + b'\\n')\n"
    text += "open('new.txt', 'w').write('new')"
    agent, file = shlex.join([sys.executable, "-S", "-c", text]), bench.folder / "peak"
    repo = bench.repository(0)
    words = (repo, "--no-baseline", "--gate", "true")
    seconds = bench.run(*words, agent=agent, before=("-c", PEAK, file))
    peak = f"{int(file.read_text()) / 1000:.0f} MB"
    return [["peak memory in a flood of 1 GB", peak, f"{seconds:.1f} s", "", "50 MB"]]


def row(name: str, ours: float, bare: float, aim: str) -> list[str]:
    return [name, f"{ours:.2f} s", f"{bare:.2f} s", f"{ours / bare:.2f}", aim]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no 100,000 files")
    parser.add_argument("--sandbox", default="auto", help="the kernel level, as for a run")
    args = parser.parse_args()
    sizes = (100, 10_000, 100_000)[: 2 if args.quick else 3]
    rows = [["what", "ours", "bare", "ratio", "aim"]]
    with tempfile.TemporaryDirectory(prefix="agent_runner-benchmark-") as folder:
        bench = Bench(Path(folder).resolve(), sandbox=args.sandbox, rounds=5 if args.quick else 15)
        rows += beside_bare_gate(bench)
        rows += [line for files in sizes for line in until_the_agent_starts(bench, files)]
        rows += memory_in_a_flood(bench) + beside_long_gate(bench)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for line in rows:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


if __name__ == "__main__":
    main()
