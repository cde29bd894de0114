"""Bad input gets one sentence with a remedy that works as pasted, exit 3, and changes nothing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import CHEAP_GATE, LEVELS, PROGRAM, Repository

ISSUE = ("issue-to-pr", "issue.md", "--sandbox", "off")
CHEAP = (*ISSUE, "--gate", CHEAP_GATE, "--no-switch")
EDIT = "sh -c 'echo >> calc.py'"  # an agent
Refused = Callable[..., str]


def everything(folder: Path) -> dict[Path, Any]:
    """Every file and folder below, the Git directory included, with its mode and its bytes."""
    modes = {path: path.lstat().st_mode for path in folder.rglob("*")}
    return {p: (mode, p.read_bytes() if stat.S_ISREG(mode) else b"") for p, mode in modes.items()}


@pytest.fixture
def refused(repo: Repository, hermetic: Path) -> Refused:
    """A run that must be refused; its one sentence. Nothing may be touched on the way."""

    def run(*words: str, agent: str | None = "true", at: Repository = repo, **how: Any) -> str:
        before = everything(at.path)
        result = at.run(*words, agent=agent, **how)
        assert result.status == 3, (words, result.out, result.err)
        assert everything(at.path) == before
        assert not [path for path in hermetic.rglob("agent-runner*/*") if path.is_dir()]
        told = result.out.partition("\nREFUSED (exit 3): ")[2]
        assert told.count("\n") == 1 and "Traceback" not in result.out + result.err, result.out
        return told.strip()

    return run


def after(line: str) -> list[str]:
    """How a run is started by a shell, behind a command that was printed."""
    return ["sh", "-c", f'({line}) >/dev/null && exec "$@"', "sh"]


def pasted(repo: Repository, told: str, *words: str, **how: Any) -> dict[str, Any]:
    """The report of a run with what a refusal has printed, read by a shell."""
    remedy = re.search(r": (?:(export .*)|(--.*))$", told)
    assert remedy, told
    line = f'{remedy[1] or ":"}; exec "$@" {remedy[2] or ""}'
    report = repo.run(*words, "--json", under=["sh", "-c", line, "sh"], **how).report
    assert report["outcome"] != "refused", report["message"]
    return report


# ------------------------------------------------------------------------ issue and command line


def test_unusable_issue_is_refused(refused: Refused, tmp_path: Path) -> None:
    for data, says in {
        b"": "is empty; write down",
        b"<!-- only this -->\n": "is empty; write down",
        b"x" * (1 << 20) + b"x": "larger than 1 MiB; cut it down",
        bytes(range(256)): "not UTF-8 text; save it as UTF-8",
        "# Tä\n".encode("utf-16"): "not UTF-8 text; save it as UTF-8",
        "# Tä\n".encode("latin-1"): "not UTF-8 text; save it as UTF-8",
    }.items():
        (tmp_path / "x.md").write_bytes(data)
        told = refused("issue-to-pr", str(tmp_path / "x.md"))
        assert says in told and "x.md" in told
    for name in ("missing.md", "..", "issue.md/x"):
        assert "give the path of a file" in refused("issue-to-pr", name)
    assert "on standard input is empty" in refused("issue-to-pr", "-")
    closed = ["sh", "-c", 'exec "$@" <&-', "sh"]
    assert "on standard input" in refused("issue-to-pr", "-", under=closed)


def test_duration_or_number_that_makes_no_sense_is_refused(refused: Refused) -> None:
    for value in ("0", "-5", "", "abc", "1h30m", "nan", "8000h"):
        told = refused(*ISSUE, f"--agent-timeout={value}")
        assert f"{value!r} is no duration" in told and "15m or 1h" in told
    assert "'inf' is no duration" in refused(*ISSUE, "--gate-timeout=inf")
    for value in ("0", "-1", "1.5", "", "101", "²"):
        told = refused("self-heal", f"--attempts={value}")
        assert f"{value!r} is no number from 1 to 100" in told


BAD = {
    "self-heel": "choose from",
    "issue-to-pr": "required: ISSUE",
    "self-heal issue.md": "unrecognized arguments: issue.md",
    "self-heal --simulate good": "choose from",
    "self-heal --agent-timeot 3": "did you mean --agent-timeout?",
    "self-heal --dryrun": "did you mean --dry-run?",
    "self-heal --gate '  '": "--gate is empty; give it a command",
    'self-heal --gate "pytest \'x"': "check its quotes",
    "self-heal --setup ''": "--setup is empty; give it a command",
    "self-heal --gate 'no-such-tool -q'": "needs no-such-tool, which was not found",
    "self-heal --base no-such-ref": "is no commit here; git branch -a",
    "self-heal --base main..main": "is no commit here",
    "self-heal --carry no-such.env": "give a path relative to the top",
    "self-heal --carry x/../.git/config": "give a path relative to the top",
    "self-heal --carry calc.py": "tracked by Git, so every clone has it already; leave it",
}


@pytest.mark.parametrize(("words", "says"), BAD.items(), ids=BAD)
def test_bad_argument_is_refused_with_its_remedy(refused: Refused, words: str, says: str) -> None:
    assert says in refused(*shlex.split(words))


def old_pythons() -> list[str]:
    """Those beside the one that runs this, as version managers keep them, or on PATH."""
    places = Path(sys.base_prefix).parent.glob("[23].*/bin/python")
    found = [str(path) for path in places if re.search(r"/(2\.\d|3\.[6-9])\.", str(path))]
    return found or [path for n in range(7, 10) if (path := shutil.which(f"python3.{n}"))]


@pytest.mark.skipif(not old_pythons(), reason="no Python before 3.10 here")
def test_old_python_gets_one_sentence(repo: Repository) -> None:
    for python in old_pythons():
        words = [python, str(PROGRAM), "issue-to-pr", "issue.md", "--simulate", "good"]
        done = subprocess.run(words, cwd=repo.path, capture_output=True)
        assert b"needs Python 3.10 or later; start it with one" in done.stderr, python
        if re.search(r"3\.[89]\b", python):  # before that, as the text of a syntax error
            assert (done.returncode, done.stderr.count(b"\n")) == (3, 1)


def test_json_reports_a_refusal_and_no_arguments_print_the_help(repo: Repository) -> None:
    before, result = everything(repo.path), repo.run("issue-to-pr", "missing.md", "--json")
    report = result.report
    assert (result.status, report["outcome"], report["exit_code"]) == (3, "refused", 3)
    assert report["branch"] is report["record"] is None and report["message"] in result.err
    status, out, _ = repo.run()
    assert status == 3 and everything(repo.path) == before
    assert all(word in out for word in ("usage:", "issue-to-pr", "self-heal", "exit statuses"))


def test_unusable_agent_command_is_refused(refused: Refused, repo: Repository) -> None:
    repo.write("tools/plain.sh", "#!/bin/sh\n")
    for command, says in {
        None: "set it to your agent's one-shot command",
        "''": "was not found",
        "agent 'do it": "check its quotes",
        "agent \\": "check its quotes",
        "no-such-agent -p": "'no-such-agent', which was not found; install",
        "./tools": "'./tools', which is a folder; name the program",
        "~/bin/none": "bin/none', which was not found",
        "tools/plain.sh -x": "is not executable; run: chmod +x",
        "cat {prompt}": "one placeholder that it knows is {prompt_file}",
    }.items():
        assert says in refused(*CHEAP, agent=command)


def test_what_is_printed_for_the_agent_works(refused: Refused, repo: Repository) -> None:
    simulate = re.search(r"--simulate \w+", refused(*CHEAP, agent=None))
    assert simulate and repo.run(*CHEAP, *simulate[0].split()).status == 0
    agent = repo.path.parent / "my agent.sh"
    agent.write_text("#!/bin/sh\necho >> calc.py\n")
    told = refused(*CHEAP, agent=shlex.quote(str(agent)))
    under = after(told.partition("run: ")[2])
    assert repo.run(*CHEAP, agent=shlex.quote(str(agent)), under=under).status == 0
    told = refused(*CHEAP, agent="cat {prompt_file} | tee seen.txt")
    commit = pasted(repo, told, *CHEAP)["commit"]
    assert "# Triple a number" in repo.git("show", f"{commit}:seen.txt")


def test_unusable_instructions_are_refused(refused: Refused, repo: Repository) -> None:
    repo.write("loose.md", "Edit away.\n")
    for name in ("no-such.md", "loose.md", "../x.md"):
        told = refused(*CHEAP, env={"AGENT_CONFIG": name})
        assert "commit it first" in told


SHELL = [
    "echo one && touch SEEN",
    "cat calc.py | tee SEEN",
    "echo one; touch SEEN",
    "echo two > SEEN",
    "WHO='a b' sh -c 'echo $WHO > SEEN'",
    "cd . && touch SEEN",
    "echo two>SEEN",
    "echo one&&touch SEEN",
]
CASES = [("AGENT_CMD", command) for command in SHELL]
CASES += [("--gate", command) for command in SHELL[:2]]
CASES += [("--setup", command) for command in SHELL[4:6]]


@pytest.mark.parametrize(("option", "command"), CASES)
def test_shell_syntax_is_refused_and_what_is_printed_works(
    refused: Refused, repo: Repository, tmp_path: Path, option: str, command: str
) -> None:
    seen = tmp_path / "seen"
    command = command.replace("SEEN", str(seen))
    words = ISSUE if option == "--gate" else CHEAP
    given = () if option == "AGENT_CMD" else (option, command)
    told = refused(*words, *given, agent=EDIT if given else command)
    assert "without a shell" in told and not seen.exists()
    pasted(repo, told, *words, "--no-baseline", agent=EDIT)
    assert seen.exists()


def test_quoted_operator_and_plain_word_are_no_shell_syntax(repo: Repository) -> None:
    words = "'a|b' 'x=1; y' --x=1 x=1 '{ }' @{u} '<none>' '> x' '&' ';' 'a && b'"
    result = repo.run(*CHEAP, "--gate", f"{CHEAP_GATE} {words}", agent=EDIT)
    assert result.status == 0, result.out


@pytest.mark.parametrize("option", ["--gate", "--setup"])
def test_unknown_placeholder_elsewhere_is_refused(refused: Refused, option: str) -> None:
    assert "{tests}" in refused(*CHEAP, option, f"{CHEAP_GATE} {{tests}}")


# ---------------------------------------------------------------------- the repository's state

# What was done to it, and the sentence; a group holds the command that mends it.
STATES = {
    "git checkout -q --orphan fresh": r"no commit yet.*run: (git add .*)$",
    "git config core.bare true": "bare repository or a Git directory; start in a work tree",
    "rm -r .git; echo gitdir: /gone > .git": "Git cannot read.*git status",
    "echo '[core' > .git/config": "bad config line 1.*git status",
    "git branch agent": "run: (git branch -m agent my-agent)",
    "git config --unset user.email": r"run: (git config user.name .*)$",
}


@pytest.mark.parametrize(("state", "says"), STATES.items(), ids=STATES)
def test_unfit_repository(refused: Refused, repo: Repository, state: str, says: str) -> None:
    subprocess.run(["sh", "-c", state], cwd=repo.path, check=True)
    told = re.search(says, refused(*CHEAP))
    assert told
    if told.groups():
        assert repo.run(*CHEAP, agent=EDIT, under=after(told[1])).status == 0


def test_partial_clone_is_refused(refused: Refused, repo: Repository, tmp_path: Path) -> None:
    repo.git("config", "uploadpack.allowFilter", "true")
    part = Repository(tmp_path / "part")
    words = ("--filter=blob:none", "--no-checkout", f"file://{repo.path}", str(part.path))
    repo.git("clone", "-q", *words)
    for key in ("name", "email"):
        part.git("config", f"user.{key}", "Ada")
    words = ("issue-to-pr", str(repo.path / "issue.md"), *CHEAP[2:])
    told = refused(*words, at=part)
    assert "partial clone" in told
    result = part.run(*words, agent=EDIT, under=after(told.partition("run: ")[2]))
    assert result.status == 0, result.out + result.err


def test_read_only_git_directory_is_refused(refused: Refused, repo: Repository) -> None:
    git_dir, under = str(repo.path / ".git"), []
    if os.getuid() == 0 and not shutil.which("bwrap"):
        pytest.skip("root writes everywhere")
    if os.getuid() == 0:
        under = ["bwrap", "--dev-bind", "/", "/", "--ro-bind", git_dir, git_dir]
    else:
        os.chmod(git_dir, 0o555)
    assert "cannot be written; make it writable" in refused(*CHEAP, under=under)
    os.chmod(git_dir, 0o755)


def only_these(folder: Path, *programs: str) -> dict[str, Any]:
    """How to run where nothing but these programs is found, beside Python's and on PATH."""
    folder.mkdir()
    for name in ("git", "sh", "rm", "chmod", "true", "find", *programs):
        (folder / name).symlink_to(str(shutil.which(name)))
    (folder / "python3").symlink_to(sys.executable)
    start = f'shift; exec "{folder}/python3" "$@"'
    return {"env": {"PATH": str(folder)}, "under": ["sh", "-c", start, "sh"]}


@pytest.mark.parametrize("missing", ["ruff", "pytest"])
def test_missing_gate_tool_is_refused_with_the_lines_that_make_it(
    refused: Refused, repo: Repository, tmp_path: Path, missing: str
) -> None:
    how = only_these(tmp_path / "bin", *{"ruff", "pytest"} - {missing})
    options = ("--sandbox", "off", "--gate-timeout", "90", "--base", "main", "--no-switch")
    told = refused(*ISSUE[:2], *options, **how)
    make, install, again = told.partition("python3 -m venv")[2].split(" && ")
    assert f"needs {missing}" in told and make == " .venv"
    assert install == ".venv/bin/python -m pip install pytest ruff"
    wanted = ["PATH=$PWD/.venv/bin:$PATH", "python3", str(PROGRAM), *ISSUE[:2]]
    assert shlex.split(again)[:5] == wanted and {*options} <= {*shlex.split(again)}
    script = tmp_path / "agent-runner"  # installed, it is no file that Python is given
    text = f"import sys\nsys.path[0] = {str(PROGRAM.parent)!r}\nimport agent_runner\n"
    script.write_text(f"{text}sys.exit(agent_runner.cli())\n")
    told = repo.run(*ISSUE, agent="true", program=script, **how).out.rpartition(" && ")[2]
    assert told.startswith('PATH="$PWD/.venv/bin:$PATH" agent-runner issue-to-pr')


def test_sandbox_or_git_that_is_not_there_is_refused(refused: Refused, tmp_path: Path) -> None:
    how = only_these(tmp_path / "bin")
    told = refused(*CHEAP, "--sandbox", "require", **how)
    assert "bubblewrap is not installed" in told and "package" in told
    (tmp_path / "bin/git").unlink()
    told = refused(*CHEAP, **how)
    assert "git was not found; install" in told and "2.34" in told


def test_other_language_names_its_gate(refused: Refused, repo: Repository, tmp_path: Path) -> None:
    repo.git("rm", "-q", "calc.py", "test_calc.py")
    repo.write("package.json", '{"name": "calc", "scripts": {"test": "true"}}\n')
    repo.write("calc.js", "exports.double = (x) => 2 * x;\n")
    repo.commit()
    told = refused(*ISSUE)
    assert told.endswith("--gate 'npm test'")
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/seen\n")
    npm.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    report = pasted(repo, told, *ISSUE, agent="sh -c 'echo >> calc.js'", env=env)
    assert report["outcome"] == "proposed"
    assert (tmp_path / "seen").read_text() == "test\ntest\n", "at the base, and for the change"


def test_repository_without_tests_is_told_at_the_start_and_still_served(repo: Repository) -> None:
    repo.git("rm", "-q", "test_calc.py")
    repo.commit()
    none = repo.run(*ISSUE, agent=EDIT)
    assert "no tests yet" in none.out.partition("▸")[0] and none.status == 1, none.out
    text = "from calc import double\n\n\ndef test_it():\n    assert double(1) == 2\n"
    one = repo.run(*ISSUE, agent=shlex.join(["sh", "-c", f"printf '{text}' > test_it.py"]))
    assert one.status == 0, one.out


@pytest.mark.parametrize("level", LEVELS)
def test_environment_not_activated_is_used(repo: Repository, tmp_path: Path, level: str) -> None:
    seen = tmp_path / "home/seen"
    tools = {"ruff": "exit 0", "pytest": f'exec "{sys.executable}" -m pytest "$@"'}
    for tool, text in tools.items():
        script = f"#!/bin/sh\necho {tool} >> '{seen}'\n{text}\n"
        repo.write(f".venv/bin/{tool}", script, mode=0o755)
    repo.write(".venv/pyvenv.cfg", "home = /usr/bin\n")
    agent = "sh -c 'echo >> calc.py; test -n \"$VIRTUAL_ENV\"; pytest --version'"
    how = only_these(tmp_path / "bin", *(["bwrap"] if level == "require" else []))
    result = repo.run(*ISSUE, "--sandbox", level, agent=agent, **how)
    assert result.status == 0, result.out + result.err
    assert "environment: .venv" in result.out.partition("▸")[0]
    assert set(seen.read_text().split()) == set(tools)
