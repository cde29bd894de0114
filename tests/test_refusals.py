"""Bad input and bad repository states: exit 3, one sentence that holds the remedy, and nothing touched."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agent_runner
from conftest import CHEAP_GATE, PROGRAM, Repository, Result, World, needs_bwrap, side_by_side

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX file modes and programs")
GOOD = ("issue-to-pr", "issue.md", "--simulate", "good")
REAL = ("issue-to-pr", "issue.md", "--gate", CHEAP_GATE)


def everything(folder: Path) -> dict[str, Any]:
    """Every file and folder below, the Git directory included, with its mode and its bytes."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        text = os.readlink(path) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path)] = (status.st_mode, text if len(text) < 1 << 20 else len(text))
    return found


def leftovers(home: Path) -> list[Path]:
    """Folders of runs that are still in the cache."""
    return [path for path in home.rglob("agent-runner*/*") if path.is_dir()]


def sentence(out: str) -> str:
    """The one sentence of a refusal; fails if more, or less, was printed."""
    blank, *lines = out.split("\n")
    assert blank == "" and len(lines) == 2 and lines[1] == "", out
    assert lines[0].startswith("REFUSED (exit 3): "), out
    return lines[0].removeprefix("REFUSED (exit 3): ")


@pytest.fixture
def refusal(
    repo: Repository, hermetic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Run `main` on words that it must refuse, and give its sentence; nothing may be touched on the way."""
    monkeypatch.chdir(repo.path)
    monkeypatch.setenv("AGENT_CMD", "true")

    def run(*words: str) -> str:
        before = everything(repo.path)
        assert agent_runner.main(words) == 3
        said = sentence(capsys.readouterr().out)
        assert everything(repo.path) == before
        assert not list(hermetic.rglob("*")), "nothing is left in the cache"
        return said

    yield run


# ------------------------------------------------------------------------------------------ the issue


def bytes_issue(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        pytest.param(lambda path: None, "does not exist; give the path", id="missing"),
        pytest.param(Path.mkdir, "is a folder; give the path of a file in it", id="a folder"),
        pytest.param(bytes_issue(b""), "is empty; write down", id="empty"),
        pytest.param(bytes_issue(b" \n\t\r\n\xef\xbb\xbf"), "is empty; write down", id="blank"),
        pytest.param(bytes_issue(b"<!-- only this -->\n"), "is empty; write down", id="nothing to be seen"),
        pytest.param(bytes_issue(b"x" * (1 << 20) + b"x"), "larger than 1 MiB; cut it down", id="just over 1 MiB"),
        pytest.param(lambda path: path.touch() or os.truncate(path, 50 << 20), "larger than 1 MiB", id="50 MB"),
        pytest.param(bytes_issue(bytes(range(256))), "not UTF-8 text; save it as UTF-8", id="binary"),
        pytest.param(bytes_issue(b"a\0b"), "not UTF-8 text; save it as UTF-8", id="NUL"),
        pytest.param(bytes_issue("# Tä\n".encode("utf-16")), "not UTF-8 text; save it as UTF-8", id="UTF-16"),
        pytest.param(bytes_issue("# Ta\n".encode("utf-16-le")), "not UTF-8 text", id="UTF-16 without its mark"),
        pytest.param(bytes_issue("# Tä\n".encode("latin-1")), "not UTF-8 text; save it as UTF-8", id="Latin-1"),
    ],
)
def test_unusable_issue_is_refused(
    refusal: Callable[..., str], tmp_path: Path, make: Callable[[Path], Any], says: str
) -> None:
    make(tmp_path / "x.md")
    said = refusal("issue-to-pr", str(tmp_path / "x.md"), "--simulate", "good")
    assert says in said and "x.md" in said


def test_issue_path_through_a_file_or_too_long_is_refused(refusal: Callable[..., str]) -> None:
    assert "cannot be read" in refusal("issue-to-pr", "issue.md/x", "--simulate", "good")
    assert "cannot be read" in refusal("issue-to-pr", "x" * 300 + ".md", "--simulate", "good")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root reads everything")
def test_unreadable_issue_is_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "x.md").touch(mode=0)
    assert "check its permissions" in refusal("issue-to-pr", str(tmp_path / "x.md"), "--simulate", "good")


@side_by_side
def test_empty_or_closed_standard_input_is_refused(world: World) -> None:
    words = ("issue-to-pr", "-", "--simulate", "good")
    assert "the issue on standard input is empty; write" in sentence(world.repo.run(*words, stdin="").out)
    if os.name != "nt":
        closed = world.repo.run(*words, under=["sh", "-c", 'exec "$@" <&-', "sh"])
        assert "the issue on standard input" in sentence(closed.out)


# -------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("option", ["--agent-timeout", "--gate-timeout"])
def test_duration_that_makes_no_sense_is_refused(refusal: Callable[..., str], option: str) -> None:
    for value in ("0", "-5", "", "abc", "1d", "1h30m", "nan", "inf", "1e9", "8000h", "0.0s"):
        assert f"{value!r} is no duration; write 90, 90s, 15m or 1h" in refusal(*GOOD, f"{option}={value}")


def test_number_of_attempts_that_makes_no_sense_is_refused(refusal: Callable[..., str]) -> None:
    for value in ("0", "-1", "1.5", "", "two", "101", "²"):
        assert f"{value!r} is no number from 1 to 100" in refusal("self-heal", f"--attempts={value}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "required: COMMAND"),
        (("self-heel",), "choose from"),
        (("issue-to-pr",), "required: ISSUE (see agent_runner.py issue-to-pr --help)"),
        (("issue-to-pr", "issue.md", "other.md"), "unrecognized arguments: other.md"),
        (("self-heal", "issue.md"), "unrecognized arguments: issue.md"),
        (("self-heal", "--simulate"), "expected one argument"),
        (("self-heal", "--simulate", "good"), "choose from"),
        (("issue-to-pr", "issue.md", "--simulate", "stuck"), "choose from"),
        (("self-heal", "--sandbox", "maybe"), "choose from"),
        ((*GOOD, "--simulat", "bad"), "did you mean --simulate?"),
        ((*GOOD, "--agent-timeot", "3"), "did you mean --agent-timeout?"),
        (("self-heal", "--dryrun"), "did you mean --dry-run?"),
        (("--versoin",), "see agent_runner.py --help"),
        ((*GOOD, "--gate", ""), "--gate is empty; give it a command"),
        ((*GOOD, "--gate", "  "), "--gate is empty; give it a command"),
        ((*GOOD, "--gate", "pytest 'x"), "check its quotes"),
        ((*GOOD, "--setup", ""), "--setup is empty; give it a command"),
        ((*GOOD, "--setup", 'npm "ci'), "check its quotes"),
        ((*GOOD, "--gate", "no-such-tool -q"), "the gate needs no-such-tool, which was not found; install it"),
        ((*GOOD, "--gate", "./no/such"), "the gate needs ./no/such, which was not found"),
        ((*GOOD, "--base", "no-such-ref"), "is no commit here; git branch -a lists what is"),
        ((*GOOD, "--base", ""), "is no commit here"),
        ((*GOOD, "--base", "-x"), "expected one argument"),
        ((*GOOD, "--base=--all"), "is no commit here"),
        ((*GOOD, "--base", "HEAD:calc.py"), "is no commit here"),
        ((*GOOD, "--carry", "no-such.env"), "give a path relative to its top"),
        ((*GOOD, "--carry", ""), "give a path relative to its top"),
        ((*GOOD, "--carry", "../home"), "give a path relative to its top"),
        ((*GOOD, "--carry", "/etc"), "give a path relative to its top"),
        ((*GOOD, "--carry", ".git"), "give a path relative to its top"),
        ((*GOOD, "--carry", "x/../.git/config"), "give a path relative to its top"),
        ((*GOOD, "--carry", "calc.py"), "is tracked by Git, so every clone has it already; leave it out"),
    ],
    ids=lambda value: " ".join(value)[:60] or "nothing" if isinstance(value, tuple) else "",
)
def test_bad_argument_is_refused_with_its_remedy(
    refusal: Callable[..., str], words: tuple[str, ...], says: str
) -> None:
    assert says in refusal(*words)


def test_refused_run_with_json_reports_it(
    repo: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repo.path)
    assert agent_runner.main(["issue-to-pr", "missing.md", "--json"]) == 3
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert (report["outcome"], report["exit_code"], report["branch"], report["record"]) == ("refused", 3, None, None)
    assert report["message"] in sentence(shown.err)


# ------------------------------------------------------------------------------------- AGENT_CMD, AGENT_CONFIG


@pytest.mark.parametrize(
    ("command", "says"),
    [
        pytest.param(None, "AGENT_CMD is not set; set it to your agent's one-shot command", id="unset"),
        pytest.param("", "AGENT_CMD is not set", id="empty"),
        pytest.param(" \t", "AGENT_CMD is not set", id="blank"),
        pytest.param("''", "starts with '', which was not found", id="an empty word"),
        pytest.param("agent 'do it", "cannot be split into words", id="unbalanced quote"),
        pytest.param("agent \\", "cannot be split into words", id="a lone backslash"),
        pytest.param("no-such-agent -p", "'no-such-agent', which was not found; install it", id="not installed"),
        pytest.param("./tools", "'./tools', which is a folder; name the program in it", id="a folder"),
        pytest.param("~", "'~', which was not found", id="the home folder"),
        pytest.param("~/bin/none", "bin/none', which was not found", id="nothing at a ~ path"),
        pytest.param("./plain.sh -x", "is not executable; run: chmod +x", id="not executable", marks=POSIX),
        pytest.param("'my agent.sh'", "'my agent.sh', which was not found", id="quoted, with a space, not there"),
    ],
)
def test_unusable_agent_command_is_refused(
    refusal: Callable[..., str], repo: Repository, monkeypatch: pytest.MonkeyPatch, command: str | None, says: str
) -> None:
    (repo.path / "tools").mkdir()
    repo.write("plain.sh", "#!/bin/sh\n")
    monkeypatch.setenv("AGENT_CMD", command or "") if command is not None else monkeypatch.delenv("AGENT_CMD")
    assert says in refusal(*REAL)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no-such.md", "is not a file in the base commit; commit it first"),
        ("loose.md", "is not a file in the base commit; commit it first"),
        ("docs", "is not a file in the base commit; commit it first"),
        ("../outside.md", "lies outside the repository; name a committed file"),
        ("docs/latin.md", "is not UTF-8 text; save it as UTF-8"),
        ("docs/nul.md", "is not UTF-8 text; save it as UTF-8"),
    ],
)
@side_by_side
def test_unusable_instructions_are_refused(world: World, name: str, says: str) -> None:
    repo = world.repo
    repo.write("docs/nul.md", "a\0b")
    (repo.path / "docs/latin.md").write_bytes(b"\xe4")
    repo.commit()
    repo.write("loose.md", "Edit away.\n")
    before = everything(repo.path)
    result = repo.run(*REAL, agent="true", env={"AGENT_CONFIG": name})
    assert (result.status, says in sentence(result.out)) == (3, True), result.out
    assert everything(repo.path) == before


# ---------------------------------------------------------------------------------------- the gate's tools


@pytest.mark.parametrize("tools", [("pytest",), ("ruff",), ()], ids=["no ruff", "no pytest", "neither"])
def test_missing_default_tool_is_refused_with_what_to_install(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: tuple[str, ...]
) -> None:
    only_these(tmp_path / "bin", ("git", *tools), monkeypatch)
    said = refusal(*GOOD)
    assert "which was not found; python3 -m pip install pytest ruff" in said
    assert "the gate needs ruff" in said or "ruff" in tools


def only_these(folder: Path, programs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH, and an interpreter's folder, in which nothing but these programs is found."""
    found = {name: shutil.which(name) for name in programs}
    folder.mkdir()
    for name, program in found.items():
        (folder / name).symlink_to(program or os.devnull)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))


def test_missing_git_is_refused(refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_these(tmp_path / "bin", (), monkeypatch)
    assert "install Git 2.34 or later" in refusal(*GOOD)


@POSIX
@pytest.mark.parametrize("version", ["2.30.2", "2.33.0", "1.8.3.1"])
def test_old_git_is_refused(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    (tmp_path / "bin").mkdir()
    git = tmp_path / "bin" / "git"
    git.write_text(f'#!/bin/sh\n[ "$1" = version ] && echo "git version {version}" && exit\nexit 129\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert f"this is git version {version}; Git 2.34 or later is needed" in refusal(*GOOD)


# -------------------------------------------------------------------------------------- repository states


def unborn(repo: Repository) -> None:
    repo.git("checkout", "-q", "--orphan", "fresh")


def bare(repo: Repository) -> None:
    repo.git("config", "core.bare", "true")


def lost_git_dir(repo: Repository) -> None:
    shutil.rmtree(repo.path / ".git")
    repo.write(".git", "gitdir: /no/such/folder\n")


def broken_config(repo: Repository) -> None:
    repo.write(".git/config", "[core\n")


def branch_named_agent(repo: Repository) -> None:
    repo.git("branch", "agent")


def no_identity(repo: Repository) -> None:
    repo.git("config", "--unset", "user.name")
    repo.git("config", "--unset", "user.email")


def no_address(repo: Repository) -> None:
    repo.git("config", "--unset", "user.email")


@pytest.mark.parametrize("command", ["issue-to-pr", "self-heal"])
@pytest.mark.parametrize(
    ("state", "says"),
    [
        (unborn, "has no commit yet; make one first: git add -A && git commit"),
        (bare, "bare repository or a Git directory; start in a work tree of it"),
        (lost_git_dir, "not a git repository: /no/such/folder); git status must work here first"),
        (broken_config, "bad config line 1 in file .git/config); git status must work here first"),
        (branch_named_agent, "rename it: git branch -m agent my-agent"),
        (no_identity, "git config user.name 'Your Name'"),
        (no_address, "git config user.email"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_repository_that_cannot_hold_a_proposal_is_refused(
    refusal: Callable[..., str], repo: Repository, command: str, state: Callable[[Repository], None], says: str
) -> None:
    state(repo)
    words = ("issue.md",) if command == "issue-to-pr" else ()
    assert says in refusal(command, *words, "--simulate", "bad")


def test_start_inside_the_git_directory_is_refused(
    refusal: Callable[..., str], repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo.path / ".git")
    assert "start in a work tree of it" in refusal("self-heal", "--simulate", "bad")


@POSIX
def test_folder_that_is_gone_is_refused(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    (repo.path / "gone").mkdir()
    program = f"cd {repo.path}/gone && rmdir . ../gone 2>/dev/null; rmdir {repo.path}/gone; "
    done = subprocess.run(
        ["sh", "-c", f'{program} exec "$0" "$@"', sys.executable, str(PROGRAM), "self-heal", "--simulate", "bad"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, sentence(done.stdout)) == (
        3, "the folder that you are in is gone; change to your repository first."
    ), done.stderr  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
def test_repository_of_somebody_else_is_refused_with_gits_own_remedy(
    refusal: Callable[..., str], repo: Repository
) -> None:
    os.chown(repo.path, 12345, 12345)
    os.chown(repo.path / ".git", 12345, 12345)
    assert "git config --global --add safe.directory" in refusal("self-heal", "--simulate", "bad")


@side_by_side
def test_partial_clone_that_lacks_files_of_the_base_is_refused(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    repo.git("config", "uploadpack.allowFilter", "true")
    part = Repository(tmp_path / "part")
    words = ("--filter=blob:none", "--no-checkout", f"file://{repo.path}", str(part.path))
    repo.git("clone", "-q", *words)
    for key, value in (("name", "Ada"), ("email", "ada@example.invalid")):
        part.git("config", f"user.{key}", value)
    before = everything(part.path)
    result = part.run("issue-to-pr", str(repo.path / "issue.md"), "--simulate", "good", "--gate", CHEAP_GATE)
    assert "get them: git fetch --refetch --no-filter" in sentence(result.out)
    assert everything(part.path) == before

    part.git("checkout", "-q", "main")  # fetches what the base needs
    assert part.run("issue-to-pr", "issue.md", "--simulate", "good", "--gate", CHEAP_GATE).status == 0


def signing_with(repo: Repository, tmp_path: Path, script: str) -> dict[str, Any]:
    program = tmp_path / "gpg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    repo.git("config", "commit.gpgSign", "true")
    repo.git("config", "gpg.program", str(program))
    return everything(repo.path)


@POSIX
@side_by_side
def test_signing_that_fails_is_refused(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    before = signing_with(repo, tmp_path, "echo 'gpg: no pinentry' >&2; exit 2")
    result = repo.run(*GOOD, "--gate", CHEAP_GATE)
    assert "unlock the key first, or run: git config commit.gpgSign false" in sentence(result.out)
    assert everything(repo.path) == before


@POSIX
@side_by_side
def test_signing_that_waits_for_a_person_is_refused_and_ended(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    mark = tmp_path / "pid"
    before = signing_with(repo, tmp_path, f"echo $$ > {mark}; exec sleep 600")
    code = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import agent_runner; agent_runner.SIGN_LIMIT = 0.5"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(agent_runner.cli())", *GOOD, "--gate", CHEAP_GATE],
        cwd=repo.path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "cannot be without asking" in sentence(done.stdout) and done.returncode == 3
    assert everything(repo.path) == before
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


@side_by_side
def test_signing_that_works_signs_the_proposal(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    words = "echo '[GNUPG:] SIG_CREATED D 1 8 00 1 X' >&2; echo '-----BEGIN PGP SIGNATURE-----'; echo mine"
    signing_with(repo, tmp_path, f"cat > /dev/null; {words}; echo '-----END PGP SIGNATURE-----'")
    assert repo.run(*GOOD, "--gate", CHEAP_GATE).status == 0
    assert "gpgsig -----BEGIN PGP SIGNATURE-----" in repo.git("cat-file", "commit", "agent/issue")


@POSIX
@side_by_side
def test_read_only_git_directory_is_refused(world: World) -> None:
    repo = world.repo
    git_dir, under = str(repo.path / ".git"), []
    if os.getuid() == 0:
        if not shutil.which("bwrap"):
            pytest.skip("root writes everywhere")
        under = ["bwrap", "--dev-bind", "/", "/", "--ro-bind", git_dir, git_dir]
    else:
        os.chmod(git_dir, 0o555)
    before = everything(repo.path)
    result = repo.run(*GOOD, under=under)
    after = everything(repo.path)
    os.chmod(git_dir, 0o755)
    assert "cannot be written; make it writable" in sentence(result.out)
    assert after == before


@needs_bwrap
@side_by_side
def test_machine_without_a_writable_cache_or_temporary_folder_is_refused(world: World) -> None:
    repo = world.repo
    before, top = everything(repo.path), str(repo.path)
    under = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--bind", top, top]
    result = repo.run(*GOOD, "--gate", CHEAP_GATE, "--sandbox", "off", under=under)
    assert "set XDG_CACHE_HOME to a folder that you can write" in sentence(result.out)
    assert everything(repo.path) == before


# ----------------------------------------------------------------------------------------- what is accepted


def proposed(repo: Repository, *words: str, **how: Any) -> Result:
    """Run to a proposal, or fail."""
    result = repo.run("issue-to-pr", *words, "--json", **how)
    assert result.status == 0, result.out + result.err
    return result


ODD_NAMES = {
    "my great issue": "my-great-issue",
    "a..b": "a-b",
    "a@{1}": "a-1",
    "-f": "f",
    "..": "issue",
    ".hidden": "hidden",
    "größe": "groe",
    "課題": "issue",
    "issue.lock": "issue",
    "x.lock.LOCK.lock": "x",
    "a~b^c:d?e*f[g\\h": "a-b-c-d-e-f-g-h",
    "tab\there\nline": "tab-here-line",
    "\x1b[31m\u202ered": "31mred",
    "x" * 300: "x" * 60,
    "x" * 59 + ".lock": "x" * 59,
    "@": "issue",
    "_._-": "issue",
}


def test_branch_name_of_any_issue_name_is_valid(repo: Repository) -> None:
    assert {name: agent_runner.slug_of(name) for name in ODD_NAMES} == ODD_NAMES
    for slug in set(ODD_NAMES.values()):
        assert repo.git("check-ref-format", "--branch", f"agent/{slug}")


@POSIX
@side_by_side
def test_issue_with_a_hostile_name_is_proposed(world: World) -> None:
    repo = world.repo
    repo.write("-x @{..}\n課 ~^:.lock.md", "\ufeff# Only a heading #\r\n")
    result = proposed(repo, "./-x @{..}\n課 ~^:.lock.md", "--simulate", "good", "--gate", CHEAP_GATE)
    assert result.report["branch"] == "agent/x"
    assert result.report["proposal"]["title"] == "Only a heading"


@side_by_side
def test_issue_on_standard_input_is_named_by_its_heading(world: World) -> None:
    repo = world.repo
    result = proposed(repo, "-", "--simulate", "good", "--gate", CHEAP_GATE, stdin="Hello.\n\n## Étagère: fix!\n")
    assert result.report["branch"] == "agent/Etagere-fix"


@POSIX
@side_by_side
def test_agent_command_is_split_as_a_shell_splits_and_nothing_else_is_replaced(world: World) -> None:
    repo = world.repo
    home = world.path / "home"
    tool = home / "my tools" / "agent.sh"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > words.txt; test -s "$3"\n')
    tool.chmod(0o755)
    words = "'{not ours} {}' $HOME {prompt_file} --brief={prompt_file} a\\ b ~ '*'"
    command, env = f"'~/my tools/agent.sh' {words}", {"HOME": str(home)}
    report = proposed(repo, "issue.md", "--gate", CHEAP_GATE, agent=command, env=env).report
    got = repo.git("show", f"{report['commit']}:words.txt").split("\n")
    assert (got[0], got[1], *got[4:]) == ("{not ours} {}", "$HOME", "a b", "~", "*")
    assert got[3] == f"--brief={got[2]}" and Path(got[2]).is_absolute()


def detached(repo: Repository) -> None:
    repo.git("checkout", "-q", "--detach")


def uncommitted_merge(repo: Repository) -> None:
    branch_off(repo, "other.py")
    repo.git("merge", "-q", "--no-commit", "--no-ff", "side")


def conflicted_merge(repo: Repository) -> None:
    branch_off(repo, "calc.py")
    repo.git("merge", "-q", "side", check=False)
    assert repo.git("ls-files", "-u")


def stopped_rebase(repo: Repository) -> None:
    branch_off(repo, "other.py")
    repo.git("rebase", "-q", "-x", "false", "HEAD~1", check=False)
    assert (repo.path / ".git/rebase-merge").is_dir() and not repo.git("status", "--porcelain")


def branch_off(repo: Repository, name: str) -> None:
    repo.git("checkout", "-q", "-b", "side")
    repo.write(name, "one = 1\n")
    repo.commit("side")
    repo.git("checkout", "-q", "main")
    repo.write("calc.py", "def double(x):\n    return x + x\n")
    repo.commit("main")


def index_locked(repo: Repository) -> None:
    repo.write(".git/index.lock", "")


def branch_in_another_work_tree(repo: Repository) -> None:
    repo.git("branch", "agent/issue")
    repo.git("worktree", "add", "-q", str(repo.path.parent / "elsewhere"), "agent/issue")


@pytest.mark.parametrize(
    ("state", "why_not_switched"),
    [
        (detached, None),
        (uncommitted_merge, "uncommitted changes"),
        (conflicted_merge, "uncommitted changes"),
        (stopped_rebase, "while rebasing"),
        (index_locked, "index.lock"),
        (branch_in_another_work_tree, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@side_by_side
def test_state_in_which_a_proposal_can_be_made_is_left_as_it_is(
    world: World, state: Callable[[Repository], None], why_not_switched: str | None
) -> None:
    repo = world.repo
    state(repo)
    head, before = repo.git("rev-parse", "HEAD"), repo.state()
    result = proposed(repo, "issue.md", "--simulate", "good", "--gate", CHEAP_GATE)
    report = result.report
    assert repo.git("rev-parse", f"{report['branch']}^") == head
    if why_not_switched:
        assert why_not_switched in "".join(report["mentions"])
        assert repo.state() | {"refs": ""} == before | {"refs": ""}
    else:
        assert repo.git("symbolic-ref", "HEAD") == f"refs/heads/{report['branch']}"
    if state is branch_in_another_work_tree:
        assert report["branch"] == "agent/issue-2" and repo.git("rev-parse", "agent/issue") == head


@side_by_side
def test_run_without_a_home_or_cache_folder_uses_the_temporary_one(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    (tmp_path / "tmp").mkdir()
    place = {"TMPDIR": str(tmp_path / "tmp")}
    proposed(repo, "issue.md", "--simulate", "good", "--gate", CHEAP_GATE, env=place | {"HOME": os.devnull})
    assert (tmp_path / "tmp").is_dir() and not leftovers(tmp_path / "tmp")
    unset: dict[str, str | None] = {"HOME": None, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    proposed(repo, "issue.md", "--simulate", "good", "--gate", CHEAP_GATE, env=unset)


@needs_bwrap
@side_by_side
def test_user_whom_the_system_does_not_know_can_run(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    (tmp_path / "tmp").mkdir()
    env: dict[str, str | None] = {"HOME": None, "TMPDIR": str(tmp_path / "tmp")}
    under = ["bwrap", "--unshare-user", "--uid", "4242", "--gid", "4242", "--ro-bind", "/", "/", "--dev", "/dev"]
    under += ["--proc", "/proc", "--bind", str(tmp_path), str(tmp_path)]
    proposed(repo, "issue.md", "--simulate", "good", "--gate", CHEAP_GATE, env=env, under=under)


@side_by_side
def test_repository_that_is_the_home_folder_works(world: World) -> None:
    repo, tmp_path = world.repo, world.path
    (tmp_path / "tmp").mkdir()
    env = {"HOME": str(repo.path), "TMPDIR": str(tmp_path / "tmp")}
    told = world.agent("#!/bin/sh\ngrep -q Triple $1 && gh 2>&1 | grep -q withheld && echo > new.txt")
    proposed(repo, "issue.md", "--gate", CHEAP_GATE, agent=f"{told} {{prompt_file}}", env=env)
    assert not repo.git("status", "--porcelain")
