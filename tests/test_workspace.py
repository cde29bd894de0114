"""The agent's workspace and what is read out of it: exactly what the agent did, and nothing of the user's."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import CHEAP_GATE, LEVELS, Repository, Result, needs_bwrap


@pytest.fixture(autouse=True)
def identity(hermetic: Path) -> None:
    """Who commits, for every repository of a test: some are made by cloning."""
    (hermetic / ".gitconfig").write_text("[user]\n\tname = Ada\n\temail = ada@example.invalid\n", encoding="utf-8")


def drive(repo: Repository, command: str, *options: str, level: str = "off", cwd: str = "") -> Result:
    """A run that is about the change and not about the gate."""
    words = ("--json", "--no-baseline", "--no-switch", "--gate", CHEAP_GATE, "--sandbox", level, *options)
    return repo.run(
        "issue-to-pr", os.path.relpath(repo.path / "issue.md", repo.path / cwd), *words, agent=command, cwd=cwd
    )


def sh(script: str) -> str:
    """An agent of one line of shell."""
    return shlex.join(["sh", "-ec", script])


def changed(repo: Repository, commit: str) -> set[str]:
    """What a commit changes, file by file, as Git's letter and the path."""
    listing = repo.git("diff-tree", "-r", "-z", "--no-renames", "--name-status", f"{commit}^", commit).split("\0")
    return {f"{status} {path}" for status, path in zip(listing[::2], listing[1::2], strict=False)}


def proposed(repo: Repository, result: Result) -> set[str]:
    """The changes of a proposal, made sure that it is the judged tree on the base."""
    assert result.status == 0, result.out + result.err
    report = result.report
    assert repo.tree(report["branch"]) == report["tree"]
    assert repo.git("rev-parse", f"{report['branch']}^") == report["base"] == repo.git("rev-parse", "HEAD")
    return changed(repo, report["branch"])


def kept(repo: Repository, result: Result) -> set[str]:
    """The changes of work that was not proposed."""
    assert result.report["branch"] is None
    return changed(repo, result.report["kept"])


def kinds(result: Result) -> set[str]:
    return {f"{finding['kind']} {finding['path']}" for finding in result.report["findings"]}


# ------------------------------------------------------------------------------ kinds of repositories


class Kind(NamedTuple):
    """A repository, the folder to start in, and the file to edit."""

    repo: Repository
    edited: str = "calc.py"
    cwd: str = ""


KINDS: dict[str, Callable[[Repository, Path], Kind]] = {}
MOUNTED = ("worktree_outside", "worktree_inside", "odd_path", "sub_folder", "borrowed_objects", "path_with_a_link")


def kind(build: Callable[[Repository, Path], Kind]) -> Callable[[Repository, Path], Kind]:
    KINDS[build.__name__] = build
    return build


def each_kind_and_level() -> list[Any]:
    """Every kind without the kernel level; with it those that depend on what is mounted where."""
    kernel = (pytest.param(KINDS[name], "require", id=f"{name}-kernel", marks=needs_bwrap) for name in MOUNTED)
    return [*(pytest.param(build, "off", id=name) for name, build in KINDS.items()), *kernel]


def cloned(repo: Repository, place: Path, *options: str) -> Repository:
    repo.git("clone", "-q", *options, str(place))
    return Repository(place)


@kind
def plain(repo: Repository, tmp: Path) -> Kind:
    (repo.path / "void/deeper").mkdir(parents=True)
    return Kind(repo)


@kind
def shallow(repo: Repository, tmp: Path) -> Kind:
    repo.commit("second")
    return Kind(cloned(repo, tmp / "shallow", "--depth", "1", f"file://{repo.path}"))


@kind
def worktree_outside(repo: Repository, tmp: Path) -> Kind:
    repo.git("worktree", "add", "-q", str(tmp / "side"))
    return Kind(Repository(tmp / "side"))


@kind
def worktree_inside(repo: Repository, tmp: Path) -> Kind:
    repo.git("worktree", "add", "-q", "side")
    return Kind(Repository(repo.path / "side"))


@kind
def sha256(repo: Repository, tmp: Path) -> Kind:
    made = Repository(tmp / "sha256")
    repo.git("init", "-q", "--object-format=sha256", str(made.path))
    made.write("calc.py", "x = 1\n")
    made.write("issue.md", "# Task\n")
    made.commit()
    return Kind(made)


@kind
def odd_path(repo: Repository, tmp: Path) -> Kind:
    return Kind(Repository(repo.path.rename(tmp / "Ä möglicher 'Pfad' [1] & $x")))


@kind
def sub_folder(repo: Repository, tmp: Path) -> Kind:
    repo.write("sub/inner/part.py", "x = 1\n")
    repo.commit()
    return Kind(repo, "sub/inner/part.py", "sub/inner")


@kind
def links_and_modes(repo: Repository, tmp: Path) -> Kind:
    repo.write("run.sh", "#!/bin/sh\n", mode=0o755)
    for name, target in (("file", "calc.py"), ("nowhere", "gone"), ("folder", ".")):
        (repo.path / name).symlink_to(target)
    repo.commit()
    return Kind(repo, "run.sh")


@kind
def crlf_by_attributes(repo: Repository, tmp: Path) -> Kind:
    repo.write(".gitattributes", "*.txt text eol=crlf\n*.md text=auto\n")
    (repo.path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    repo.commit()
    return Kind(repo, "a.txt")


@kind
def crlf_that_normalisation_would_change(repo: Repository, tmp: Path) -> Kind:
    (repo.path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    repo.commit()
    repo.write(".gitattributes", "*.txt text\n")
    repo.git("add", ".gitattributes")
    repo.git("commit", "-q", "-m", "not normalised")
    return Kind(repo)


@kind
def crlf_by_global_settings(repo: Repository, tmp: Path) -> Kind:
    (repo.path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    repo.commit()
    repo.git("config", "--global", "core.autocrlf", "true")
    repo.git("config", "--global", "core.safecrlf", "true")
    return Kind(repo, "a.txt")


@kind
def crlf_by_local_settings(repo: Repository, tmp: Path) -> Kind:
    (repo.path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    repo.commit()
    repo.git("config", "core.autocrlf", "input")
    repo.git("config", "core.safecrlf", "true")
    return Kind(repo, "a.txt")


@kind
def sparse_checkout(repo: Repository, tmp: Path) -> Kind:
    for name in ("near/a.py", "far/b.py"):
        repo.write(name, "x = 1\n")
    repo.commit()
    repo.git("sparse-checkout", "set", "near")
    assert not (repo.path / "far").exists()
    return Kind(repo, "far/b.py")


@kind
def split_index_and_untracked_cache(repo: Repository, tmp: Path) -> Kind:
    repo.git("config", "core.splitIndex", "true")
    repo.git("update-index", "--split-index", "--force-untracked-cache")
    return Kind(repo)


@kind
def local_filter(repo: Repository, tmp: Path) -> Kind:
    repo.git("config", "filter.shout.clean", "tr a-z A-Z")
    repo.git("config", "filter.shout.smudge", "tr A-Z a-z")
    repo.git("config", "filter.shout.required", "true")
    repo.write(".gitattributes", "*.txt filter=shout\n")
    repo.write("a.txt", "shout\n")
    repo.commit()
    return Kind(repo, "a.txt")


@kind
def global_filter(repo: Repository, tmp: Path) -> Kind:
    repo.git("config", "--global", "filter.shout.clean", "tr a-z A-Z")
    repo.git("config", "--global", "filter.shout.smudge", "tr A-Z a-z")
    repo.write(".gitattributes", "*.txt filter=shout\n")
    repo.write("a.txt", "shout\n")
    repo.commit()
    return Kind(repo, "a.txt")


@kind
def submodules(repo: Repository, tmp: Path) -> Kind:
    other = cloned(repo, tmp / "other", f"file://{repo.path}")
    for name in ("there", "not_there"):
        repo.git("-c", "protocol.file.allow=always", "submodule", "add", "-q", f"file://{other.path}", name)
    repo.commit()
    repo.git("submodule", "deinit", "-q", "-f", "not_there")
    repo.write("there/calc.py", "edited = True\n")
    return Kind(repo)


@kind
def borrowed_objects(repo: Repository, tmp: Path) -> Kind:
    first = cloned(repo, tmp / "first", "--shared", str(repo.path))
    second = cloned(first, tmp / "second", "--shared", str(first.path))
    relative = os.path.relpath(first.path / ".git/objects", second.path / ".git/objects")
    (second.path / ".git/objects/info/alternates").write_text(f"# borrowed\n{relative}\n")
    return Kind(second)


@kind
def detached_and_git_folder_elsewhere(repo: Repository, tmp: Path) -> Kind:
    repo.git("init", "-q", "--separate-git-dir", str(tmp / "elsewhere.git"))
    repo.git("checkout", "-q", "--detach")
    return Kind(repo)


@kind
def path_with_a_link(repo: Repository, tmp: Path) -> Kind:
    (tmp / "link").symlink_to(tmp, target_is_directory=True)
    return Kind(Repository(tmp / "link" / repo.path.name))


@kind
def ignored_but_tracked(repo: Repository, tmp: Path) -> Kind:
    repo.write(".gitignore", "*.log\n")
    repo.write("build.log", "kept\n")
    repo.git("add", "-f", "build.log")
    repo.commit()
    return Kind(repo, "build.log")


@pytest.mark.parametrize(("build", "level"), each_kind_and_level())
def test_every_kind_of_repository_gives_exactly_the_edit(
    build: Callable[[Repository, Path], Kind], level: str, repo: Repository, tmp_path: Path
) -> None:
    made, edited, cwd = build(repo, tmp_path)
    place = os.path.relpath(edited, cwd or ".")
    before = made.state()
    agents = ("true", sh(f"echo '# edited' >> {place}"))
    with ThreadPoolExecutor(2) as pool:
        idle, edit = pool.map(lambda command: drive(made, command, level=level, cwd=cwd), agents)
    assert (idle.status, idle.report["message"]) == (4, "the agent changed nothing"), idle.out + idle.err
    assert proposed(made, edit) == {f"M {edited}"}
    assert made.git("diff", "--numstat", "--summary", edit.report["base"], edit.report["branch"]) == f"1\t0\t{edited}"
    made.git("fsck", "--strict")
    made.git("branch", "-q", "-D", edit.report["branch"])
    assert made.state() == before


def test_partial_clone_that_lacks_the_base_is_refused(repo: Repository, tmp_path: Path) -> None:
    repo.write("calc.py", "x = 2\n")
    repo.commit()
    repo.git("config", "uploadpack.allowFilter", "true")
    partial = cloned(repo, tmp_path / "partial", "--filter=blob:none", f"file://{repo.path}")
    assert drive(partial, "true").status == 4
    lacking = drive(partial, "true", "--base", "HEAD~1")
    assert lacking.status == 3
    assert "partial clone" in lacking.report["message"]


# -------------------------------------------------------------------------------- what is not missed


def test_edit_of_same_length_in_the_same_second_is_not_missed(repo: Repository, agent: Any) -> None:
    edit = """
        import os
        for name, restored in (("calc.py", False), ("test_calc.py", True)):
            was = os.stat(name)
            with open(name, "r+b") as file:
                text = file.read()
                file.seek(0)
                file.write(text.replace(b"2", b"3").replace(b"6", b"9"))
            if restored:
                os.utime(name, ns=(was.st_atime_ns, was.st_mtime_ns))
    """
    assert proposed(repo, drive(repo, agent(edit))) == {"M calc.py", "M test_calc.py"}


def test_rewriting_a_file_as_it_was_is_no_change(repo: Repository) -> None:
    (repo.path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    repo.write("z.slow", "x\n")
    repo.commit()
    # A checkout that goes on into a later second leaves a.txt with times that Git trusts without reading it.
    repo.git("config", "--global", "filter.slow.smudge", "cat; sleep 1.1")
    repo.write(".gitattributes", "*.txt text\n*.slow filter=slow\n")
    repo.git("add", ".gitattributes")
    repo.git("commit", "-q", "-m", "not normalised")
    result = drive(repo, sh("touch a.txt"))
    assert result.report["message"] == "the agent changed nothing", result.out


# ----------------------------------------------------------------------------- what is read, and what is not

SEVERAL = r"""
rm calc.py; mkdir calc.py; echo x > calc.py/a
rm -r d; echo x > d
chmod +x run.sh; chmod 0 test_calc.py; mkdir locked; echo x > locked/x; chmod 0 locked/x locked
mkfifo pipe; mkdir -p empty/deeper
touch -- "it's" '"quoted"' -- -rf ' a ' 'b\c' ':(top)x' '*' ü '#x' '!y'
ln -s run.sh link; ln -s gone dangling
echo > a.log; mkdir out; echo > out/x
echo > 'early:ignored'; echo 'early*' >> .gitignore
"""
SEVERAL_CHANGES = set(
    """D calc.py|A calc.py/a|D d/e/f.py|A d|M run.sh|A locked/x|M .gitignore|A link|A dangling
    |A it's|A "quoted"|A --|A -rf|A  a |A b\\c|A :(top)x|A *|A ü|A #x|A !y""".replace("\n    ", "").split("|")
)
# A setup that changes a tracked file and adds one: the base's tree is then not what the agent started from.
SETUP = ("--setup", "sh -c 'echo generated >> issue.md; echo > made.by.setup'")


@pytest.mark.parametrize("options", [(), SETUP], ids=["plain", "after-setup"])
def test_change_is_what_lies_on_disk_and_is_not_ignored(repo: Repository, options: tuple[str, ...]) -> None:
    repo.write("d/e/f.py", "x = 1\n")
    repo.write("run.sh", "#!/bin/sh\n")
    repo.write(".gitignore", "*.log\nout/\n")
    repo.commit()
    with ThreadPoolExecutor(2) as pool:
        scripts = (SEVERAL, "rm -rf -- * .gitignore")
        several, nothing_left = pool.map(lambda script: drive(repo, sh(script), *options), scripts)
    assert proposed(repo, several) == SEVERAL_CHANGES
    assert all(f"note: {name} is hidden" in several.err for name in ("a.log", "out/", "early:ignored"))
    assert proposed(repo, nothing_left) == {f"D {path}" for path in repo.git("ls-files").split()}


def test_what_setup_does_to_tracked_files_is_no_part_of_the_change(repo: Repository) -> None:
    assert drive(repo, "true", *SETUP).report["message"] == "the agent changed nothing"
    assert proposed(repo, drive(repo, sh("echo >> calc.py"), *SETUP)) == {"M calc.py"}


# Each: what the agent does, the finding that rejects it, and what is kept of it all the same.
UNFIT = {
    "nested_with_commits": (
        "mkdir n; echo 1 > n/x; cd n; git init -q; git add .; git commit -qm mine",
        "nested n",
        {"A n/x"},
    ),
    "nested_without_commits": ("git init -q n; echo 1 > n/x", "nested n", {"A n/x"}),
    "nested_by_a_git_file": ("git init -q --separate-git-dir=../apart n; echo 1 > n/x", "nested n", {"A n/x"}),
    "nested_in_a_tracked_folder": ("git init -q d; echo 1 > d/e/x", "nested d", {"A d/e/x"}),
    "nested_in_nested": ("git init -q n; git init -q n/m; echo 1 > n/m/x", "nested n/m", {"A n/m/x"}),
    "link_to_the_checkout": ("rm -r d; ln -s {user} d", "symlink d", {"D d/e/f.py", "A d"}),
    "link_to_a_folder_outside": ("rm -r d; ln -s ../../.. d", "symlink d", {"D d/e/f.py", "A d"}),
    "name_with_a_newline": ("touch 'a\nb'", "path a\nb", {"A a\nb"}),
    "name_that_is_not_utf8": ("touch \"$(printf 'a\\377')\"", "path a\\udcff", {"A a\udcff"}),
    "names_that_git_keeps_for_itself": (
        "echo 1 > git~1; mkdir .GIT; echo 1 > .GIT/config; echo 1 > x",
        "path git~1",
        {"A x"},
    ),
    "pipe_in_a_files_place": ("rm issue.md; mkfifo issue.md; echo 1 > x", "path issue.md", {"A x"}),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_no_commit_can_hold_elsewhere_is_rejected_and_kept(repo: Repository, name: str) -> None:
    repo.write("d/e/f.py", "x = 1\n")
    repo.commit()
    before = repo.state()
    script, finding, expected = UNFIT[name]
    result = drive(repo, sh(script.replace("{user}", str(repo.path))))
    assert result.status == 1, result.out + result.err
    assert finding in kinds(result)
    assert kept(repo, result) == expected
    assert repo.state() == before


def test_submodule_is_carried_over_unread(repo: Repository, tmp_path: Path) -> None:
    KINDS["submodules"](repo, tmp_path)
    mark = tmp_path / "mark"
    plant = f"git init -q; touch x; git add x; git commit -qm mine; git config core.fsmonitor 'touch {mark}; false'"
    result = drive(repo, sh(f"(cd not_there; {plant}; echo y > x); rmdir there; echo >> calc.py"))
    assert proposed(repo, result) == {"M calc.py"}
    assert not mark.exists()


# ------------------------------------------------------------------------- what the agent does to its clone

# Each makes the edits that EDITS names, and something to hide, change or enlarge them.
EDITS = "echo '# mine' >> calc.py; echo >> test_calc.py; echo > new.py"
TRICKS = {
    "git_folder_deleted": "rm -rf .git",
    "git_folder_replaced": "rm -rf .git; echo 'gitdir: {user}/.git' > .git",
    "history_of_its_own": (
        "git add -A; git commit -qm mine; git tag mine; git checkout -q -b other; echo > gone; git add gone; "
        "git stash -q; git branch -D main; git reset -q --soft other"
    ),
    "hidden_files": (
        "mkdir -p .git/info; git update-index --assume-unchanged calc.py; git update-index --skip-worktree test_calc.py; "
        "echo '*' >> .git/info/exclude; git replace HEAD $(git commit-tree -m fake $(git mktree < /dev/null)); "
        "git config core.excludesFile $PWD/.git/info/exclude; git config core.sparseCheckout true"
    ),
    "programs_in_its_settings": (
        "for key in core.fsmonitor core.sshCommand core.pager core.editor diff.external diff.x.command "
        "diff.x.textconv filter.x.clean filter.x.smudge filter.x.process merge.x.driver uploadpack.packObjectsHook "
        "core.alternateRefsCommand gpg.program credential.helper core.askPass; "
        "do git config $key 'touch {mark}; cat'; done; git config commit.gpgSign true; "
        "mkdir -p .git/info .git/hooks; for hook in post-checkout reference-transaction post-index-change pre-commit; "
        "do printf '#!/bin/sh\\ntouch {mark}\\n' > .git/hooks/$hook; chmod +x .git/hooks/$hook; done; "
        "echo '* filter=x diff=x merge=x' > .git/info/attributes; "
        "git config core.hooksPath .git/hooks; git config core.worktree {user}; git config core.bare true"
    ),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("trick", TRICKS)
def test_nothing_in_the_clones_git_folder_counts(repo: Repository, trick: str, level: str, tmp_path: Path) -> None:
    before, mark = repo.state(), tmp_path / "mark"
    script = TRICKS[trick].replace("{user}", str(repo.path)).replace("{mark}", str(mark))
    result = drive(repo, sh(f"{EDITS}; {script}"), level=level)
    assert proposed(repo, result) == {"M calc.py", "M test_calc.py", "A new.py"}
    repo.git("branch", "-q", "-D", result.report["branch"])
    assert repo.state() == before
    assert not mark.exists()


def test_attributes_in_the_change_run_no_program_of_the_agents(repo: Repository, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    plant = f"for key in filter.x.clean filter.x.process diff.x.textconv; do git config $key 'touch {mark}; cat'; done"
    result = drive(repo, sh(f"echo '* filter=x diff=x' > .gitattributes; echo >> calc.py; {plant}"))
    assert kinds(result) == {"judge-changed .gitattributes"}
    assert kept(repo, result) == {"A .gitattributes", "M calc.py"}
    assert not mark.exists()


def test_settings_planted_in_the_home_folder_run_nothing_and_hide_nothing(
    repo: Repository, hermetic: Path, tmp_path: Path
) -> None:
    KINDS["submodules"](repo, tmp_path)
    mark = tmp_path / "mark"
    keys = "core.fsmonitor uploadpack.packObjectsHook core.alternateRefsCommand diff.external filter.x.clean"
    script = (
        f"echo >> calc.py; echo > new.py; for key in {keys}; do git config --global $key 'touch {mark}; false'; done; "
        "mkdir -p ~/.config/git; echo '*' > ~/.config/git/ignore; echo '* filter=x' > ~/.config/git/attributes; "
        f"git config --file {repo.path}/.git/modules/there/config core.fsmonitor 'touch {mark}; false'"
    )
    result = drive(repo, sh(script))
    assert result.status == 5
    assert not mark.exists()
    (hermetic / ".gitconfig").unlink()
    assert kept(repo, result) == {"M calc.py", "A new.py"}


# -------------------------------------------------------------------------------------- what is the user's


def users_work(repo: Repository) -> None:
    """Every kind of thing that a user may have lying in the checkout."""
    repo.write(".gitignore", "*.env\n")
    repo.write("half.py", "x = 1\n")
    repo.commit()
    repo.write("half.py", "x = 2\n")
    repo.git("add", "half.py")
    repo.write("half.py", "x = 3\n")
    repo.write("staged.py", "x = 1\n")
    repo.git("add", "staged.py")
    repo.write("intended.py", "x = 1\n")
    repo.git("add", "-N", "intended.py")
    for name in ("untracked.py", "new.py", "folder/untracked.py", "secret.env"):
        repo.write(name, "mine = True\n")
    repo.git("rm", "-q", "--cached", "test_calc.py")


@pytest.mark.parametrize("level", LEVELS)
def test_uncommitted_work_is_neither_swept_in_nor_changed(repo: Repository, level: str) -> None:
    users_work(repo)
    before = repo.state()
    words = ("issue-to-pr", "issue.md", "--json", "--no-baseline", "--gate", CHEAP_GATE, "--sandbox", level)
    script = "test ! -e untracked.py; test ! -e secret.env; echo >> half.py; echo > new.py; echo > staged.py"
    result = repo.run(*words, agent=sh(script))
    assert proposed(repo, result) == {"M half.py", "A new.py", "A staged.py"}
    repo.git("branch", "-q", "-D", result.report["branch"])
    assert repo.state() == before


@pytest.mark.parametrize("level", LEVELS)
def test_folder_replaced_by_a_link_to_the_checkout_leaves_the_checkout_whole(repo: Repository, level: str) -> None:
    users_work(repo)
    repo.git("commit", "-q", "-m", "half")
    repo.write("sub/x.py", "x = 1\n")
    repo.git("add", "sub")
    repo.git("commit", "-q", "-m", "sub")
    before = repo.state()
    result = drive(repo, sh(f"cd ..; rm -r sub; ln -s {repo.path} sub"), level=level, cwd="sub")
    assert result.status == 1, result.out + result.err
    assert kept(repo, result) == {"D sub/x.py", "A sub"}
    assert repo.state() == before


REPLACE_WORKSPACE = 'here="$PWD"; cd ..; rm -rf "$here"; ln -s {user} "$here"'


def test_workspace_replaced_by_a_link_to_the_checkout_is_not_read(repo: Repository) -> None:
    users_work(repo)
    before = repo.state()
    result = drive(repo, sh(REPLACE_WORKSPACE.replace("{user}", str(repo.path))))
    assert (result.status, result.report["kept"]) == (4, None)
    assert repo.state() == before


def test_workspace_replaced_by_a_link_is_not_read_after_a_kill_either(repo: Repository) -> None:
    users_work(repo)
    before = repo.state()
    killed = drive(repo, sh(REPLACE_WORKSPACE.replace("{user}", str(repo.path)) + "; kill -9 $PPID"))
    assert killed.status == -9
    assert drive(repo, "true").status == 4
    assert repo.git("for-each-ref", "refs/agent-runner/") == ""
    assert repo.state() == before


def test_work_of_a_killed_run_is_kept_by_the_next(repo: Repository) -> None:
    repo.write("note.env", "mine\n")
    drive(repo, sh("echo >> calc.py; echo > new.py; echo >> note.env; kill -9 $PPID"), "--carry", "note.env")
    assert drive(repo, "true").status == 4
    (ref,) = repo.git("for-each-ref", "--format=%(refname)", "refs/agent-runner/").split()
    assert changed(repo, ref) == {"M calc.py", "A new.py"}


@needs_bwrap
def test_users_program_outlives_an_agent_that_moves_its_mount_point_away(repo: Repository) -> None:
    agent = repo.write("tools/bin/agent", "#!/bin/sh\nmv tools t; ln -s {user}/tools tools; echo > new\n", mode=0o755)
    agent.write_text(agent.read_text().replace("{user}", str(repo.path)))
    result = drive(repo, "tools/bin/agent", level="require")
    assert result.status == 1, result.out + result.err
    assert "A new" in kept(repo, result)
    assert agent.exists()


@pytest.mark.parametrize("level", LEVELS)
def test_start_folder_that_the_agent_takes_away_is_a_red_gate(repo: Repository, level: str, tmp_path: Path) -> None:
    repo.write("sub/x.py", "x = 1\n")
    repo.commit()
    (tmp_path / "elsewhere").mkdir()
    for script in ("echo > sub", f"ln -s {tmp_path}/elsewhere sub"):
        result = drive(repo, sh(f"cd ..; rm -r sub; {script}"), "--gate", "touch judged", level=level, cwd="sub")
        assert result.status == 1, result.out + result.err
        assert kept(repo, result) == {"D sub/x.py", "A sub"}
    assert not os.listdir(tmp_path / "elsewhere")


# ------------------------------------------------------------------------------------ what is carried along


@pytest.mark.parametrize("level", LEVELS)
def test_carried_files_are_there_and_never_proposed(repo: Repository, level: str) -> None:
    repo.write(".gitignore", "*.env\nmodules/\n")
    repo.commit()
    repo.write("a.env", "secret\n")
    repo.write("modules/x/y.js", "x\n")
    repo.write("plain.txt", "untracked, and not ignored\n")
    (repo.path / "link.env").symlink_to("a.env")
    before = repo.state()
    carry = [word for name in ("a.env", "./modules", "plain.txt", "link.env") for word in ("--carry", name)]
    gate = ("--gate", "grep -q secret a.env", "--gate", "test -e modules/x/y.js")
    read = "grep -q secret a.env; test -e modules/x/y.js; grep -q untracked plain.txt; "
    script = (
        f"{read} rm .gitignore; echo x | tee -a a.env plain.txt link.env modules/x/y.js modules/new; echo >> calc.py"
    )
    result = drive(repo, sh(script), *carry, *gate, level=level)
    assert proposed(repo, result) == {"M calc.py", "D .gitignore"}
    repo.git("branch", "-q", "-D", result.report["branch"])
    assert repo.state() == before


def test_carried_file_is_not_written_through_a_link_of_the_agents(repo: Repository, tmp_path: Path) -> None:
    repo.write("conf/tracked", "x\n")
    repo.commit()
    repo.write("conf/a.env", "carried\n")
    theirs = tmp_path / "conf" / "a.env"
    theirs.parent.mkdir()
    theirs.write_text("another\n", encoding="utf-8")
    result = drive(repo, sh(f"rm -r conf; ln -s {theirs.parent} conf"), "--carry", "conf/a.env")
    assert result.status == 1, result.out + result.err
    assert theirs.read_text(encoding="utf-8") == "another\n"


@pytest.mark.parametrize("path", ["calc.py", "gone", "..", ".", ".git/config"])
def test_carry_of_what_is_no_ignored_file_of_the_repository_is_refused(repo: Repository, path: str) -> None:
    result = drive(repo, "true", "--carry", path)
    assert result.status == 3
    assert "--carry" in result.report["message"]
