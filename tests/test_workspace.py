"""The agent's workspace and what is read out of it: exactly what the agent did, and nothing of the user's."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
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
    issue = os.path.relpath(repo.path / "issue.md", repo.path / cwd)
    words = ("--json", "--no-baseline", "--no-switch", "--gate", CHEAP_GATE, "--sandbox", level, *options)
    return repo.run("issue-to-pr", issue, *words, agent=command, cwd=cwd)


def drive_each(
    repo: Repository, commands: Iterable[str], *options: str, level: str = "off", cwd: str = ""
) -> list[Result]:
    """Runs side by side, one for each agent."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: drive(repo, command, *options, level=level, cwd=cwd), commands))


def sh(script: str) -> str:
    """An agent of a few lines of shell."""
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


def findings(result: Result) -> set[str]:
    return {f"{finding['kind']} {finding['path']}" for finding in result.report["findings"]}


def state_without(repo: Repository, result: Result) -> dict[str, str]:
    """The user's side of the repository, once the proposal has been dropped again."""
    repo.git("branch", "-q", "-D", result.report["branch"])
    return repo.state()


# ------------------------------------------------------------------------------ kinds of repositories


class Kind(NamedTuple):
    """A repository, the files to edit, and the folder to start in."""

    repo: Repository
    edited: tuple[str, ...] = ("calc.py",)
    cwd: str = ""


Build = Callable[[Repository, Path], Kind]
KINDS: dict[str, Build] = {}
MOUNTED = ("worktree_outside", "worktree_inside", "odd_path", "sub_folder", "borrowed_objects", "path_with_a_link")


def kind(build: Build) -> Build:
    KINDS[build.__name__] = build
    return build


def cloned(repo: Repository, place: Path, *options: str) -> Repository:
    repo.git("clone", "-q", *options, str(place))
    return Repository(place)


@kind
def odd_contents(repo: Repository, tmp: Path) -> Kind:
    """Links, modes, ignored files, line endings; a filter that only this repository has."""
    repo.write("run.sh", "#!/bin/sh\n", mode=0o755)
    for name, target in (("file", "calc.py"), ("nowhere", "gone"), ("folder", ".")):
        (repo.path / name).symlink_to(target)
    repo.write("build.log", "tracked all the same\n")
    repo.write("loud.txt", "loud\n")
    for name in ("crlf.bat", "not-normalised.c"):
        (repo.path / name).write_bytes(b"one\r\ntwo\r\n")
    repo.git("config", "filter.shout.clean", "tr a-z A-Z")
    repo.git("config", "filter.shout.smudge", "tr A-Z a-z")
    repo.git("config", "filter.shout.required", "true")
    repo.write(".gitattributes", "*.txt filter=shout\n*.bat text eol=crlf\n*.md text=auto\n")
    repo.commit()
    repo.write(".gitignore", "*.log\n")
    repo.write(".gitattributes", "*.txt filter=shout\n*.bat text eol=crlf\n*.md text=auto\n*.c text\n")
    repo.git("add", ".gitattributes", ".gitignore")
    repo.git("commit", "-q", "-m", "not normalised")
    (repo.path / "void/deeper").mkdir(parents=True)
    return Kind(repo, ("run.sh", "build.log", "loud.txt", "crlf.bat", "calc.py"))


@kind
def global_settings(repo: Repository, tmp: Path) -> Kind:
    repo.git("config", "--global", "filter.shout.clean", "tr a-z A-Z")
    repo.git("config", "--global", "filter.shout.smudge", "tr A-Z a-z")
    repo.write(".gitattributes", "*.txt filter=shout\n")
    repo.write("loud.txt", "loud\n")
    (repo.path / "crlf.c").write_bytes(b"one\r\ntwo\r\n")
    repo.commit()
    repo.git("config", "--global", "core.autocrlf", "true")
    repo.git("config", "--global", "core.safecrlf", "true")
    return Kind(repo, ("crlf.c", "loud.txt"))


@kind
def local_settings(repo: Repository, tmp: Path) -> Kind:
    """What speeds Git up, a Git folder elsewhere, a HEAD that is on no branch."""
    (repo.path / "crlf.c").write_bytes(b"one\r\ntwo\r\n")
    repo.commit()
    for key, value in (("core.autocrlf", "input"), ("core.safecrlf", "true"), ("core.splitIndex", "true")):
        repo.git("config", key, value)
    repo.git("update-index", "--split-index", "--force-untracked-cache")
    repo.git("init", "-q", "--separate-git-dir", str(tmp / "elsewhere.git"))
    repo.git("checkout", "-q", "--detach")
    return Kind(repo, ("crlf.c", "calc.py"))


@kind
def sparse_checkout(repo: Repository, tmp: Path) -> Kind:
    for name in ("near/a.py", "far/b.py"):
        repo.write(name, "x = 1\n")
    repo.commit()
    repo.git("sparse-checkout", "set", "near")
    assert not (repo.path / "far").exists()
    return Kind(repo, ("far/b.py", "near/a.py"))


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
    return Kind(repo, ("sub/inner/part.py", "calc.py"), "sub/inner")


@kind
def submodules(repo: Repository, tmp: Path) -> Kind:
    other = cloned(repo, tmp / "other", f"file://{repo.path}")
    for name in ("there", "not_there"):
        repo.git("-c", "protocol.file.allow=always", "submodule", "add", "-q", f"file://{other.path}", name)
    repo.write(".gitignore", "/there\n")
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
def path_with_a_link(repo: Repository, tmp: Path) -> Kind:
    (tmp / "link").symlink_to(tmp, target_is_directory=True)
    return Kind(Repository(tmp / "link" / repo.path.name))


@pytest.mark.parametrize(
    ("name", "level"),
    [*((name, "off") for name in KINDS), *(pytest.param(name, "require", marks=needs_bwrap) for name in MOUNTED)],
)
def test_every_kind_of_repository_gives_exactly_the_edit(
    name: str, level: str, repo: Repository, tmp_path: Path
) -> None:
    made, edited, cwd = KINDS[name](repo, tmp_path)
    before = made.state()
    places = " ".join(os.path.relpath(path, cwd or ".") for path in edited)
    agents = [sh(f"for file in {places}; do echo '# EDITED' >> $file; done"), "true"][: 2 if level == "off" else 1]
    edit, *idle = drive_each(made, agents, level=level, cwd=cwd)
    assert all(run.report["message"] == "the agent changed nothing" for run in idle), idle
    assert proposed(made, edit) == {f"M {path}" for path in edited}
    lines = made.git("diff", "--numstat", "--summary", edit.report["base"], edit.report["branch"]).splitlines()
    assert sorted(lines) == sorted(f"1\t0\t{path}" for path in edited)
    made.git("fsck", "--strict")
    assert state_without(made, edit) == before


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
    repo.git("config", "--global", "filter.quick.smudge", "cat")
    repo.git("config", "--global", "filter.slow.smudge", "cat; sleep 1.1")
    repo.write(".gitattributes", "*.txt text filter=quick\n*.slow filter=slow\n")
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
    several, all_gone, nothing = drive_each(repo, map(sh, (SEVERAL, "rm -rf -- * .gitignore", ":")), *options)
    assert proposed(repo, several) == SEVERAL_CHANGES
    assert all(f"note: {name} is hidden" in several.err for name in ("a.log", "out/", "early:ignored"))
    assert proposed(repo, all_gone) == {f"D {path}" for path in repo.git("ls-files").split()}
    assert nothing.report["message"] == "the agent changed nothing"


# What the agent does, the findings that reject it, and what is kept all the same.
UNFIT = {
    "repositories": (
        "for name in a b c d e e/f; do mkdir -p $name; done; echo 1 | tee a/x b/x c/x d/e/x e/f/x; "
        "git init -q a; git -C a add .; git -C a commit -qm mine; git init -q b; "
        "git init -q --separate-git-dir=../apart c; git init -q d; git init -q e/f; git init -q e",
        {"nested a", "nested b", "nested c", "nested d", "nested e", "nested e/f"},
        {"A a/x", "A b/x", "A c/x", "A d/e/x", "A e/f/x"},
    ),
    "links": (
        "rm -r d; ln -s {user} d; ln -s ../../.. up; ln -s .git/config own",
        {"symlink d", "symlink up", "symlink own"},
        {"D d/e/f.py", "A d", "A up", "A own"},
    ),
    "names": (
        "touch 'a\nb' \"$(printf 'a\\377')\" Calc.py; echo 1 > git~1; mkdir .GIT; echo 1 > .GIT/config; "
        "rm issue.md; mkfifo issue.md",
        {"path a\nb", "path a\\udcff", "path Calc.py", "path git~1", "path .GIT/config", "path issue.md"},
        {"A a\nb", "A a\udcff", "A Calc.py"},
    ),
}


@pytest.mark.parametrize(
    ("what", "level"), [*((what, "off") for what in UNFIT), pytest.param("links", "require", marks=needs_bwrap)]
)
def test_what_no_commit_can_hold_elsewhere_is_rejected_and_kept(repo: Repository, what: str, level: str) -> None:
    repo.write("d/e/f.py", "x = 1\n")
    repo.commit()
    before = repo.state()
    script, found, expected = UNFIT[what]
    result = drive(repo, sh(script.replace("{user}", str(repo.path))), level=level)
    assert result.status == 1, result.out + result.err
    assert findings(result) == found
    assert kept(repo, result) == expected
    assert repo.state() == before


def test_submodule_is_carried_over_unread(repo: Repository, tmp_path: Path) -> None:
    submodules(repo, tmp_path)
    mark = tmp_path / "mark"
    plant = f"git init -q; touch x; git add x; git commit -qm mine; git config core.fsmonitor 'touch {mark}; false'"
    result = drive(repo, sh(f"(cd not_there; {plant}; echo y > x); rmdir there; echo >> calc.py"))
    assert proposed(repo, result) == {"M calc.py"}
    assert not mark.exists()


# ------------------------------------------------------------------------- what the agent does to its clone

EDITS = "echo '# mine' >> calc.py; echo >> test_calc.py; echo > new.py"
# After these edits, the agent hides them, does something else with its history, and plants programs.
TRICKS = {
    "deleted": "rm -rf .git",
    "the_users": "rm -rf .git; echo 'gitdir: {user}/.git' > .git",
    "misused": """
        git add -A; git commit -qm mine; git tag mine; git checkout -q -b other; echo > gone; git add gone
        git stash -q; git branch -D main
        mkdir -p .git/info .git/hooks
        git update-index --assume-unchanged calc.py; git update-index --skip-worktree test_calc.py
        git replace HEAD $(git commit-tree -m fake $(git mktree < /dev/null)); git config core.sparseCheckout true
        echo '*' >> .git/info/exclude; echo '* filter=x diff=x merge=x' > .git/info/attributes
        for key in core.fsmonitor core.pager core.editor diff.external diff.x.command diff.x.textconv filter.x.clean \
            filter.x.smudge filter.x.process uploadpack.packObjectsHook core.alternateRefsCommand gpg.program
        do git config $key 'touch {mark}; cat'; done
        for hook in post-checkout reference-transaction post-index-change pre-commit
        do printf '#!/bin/sh\\ntouch {mark}\\n' > .git/hooks/$hook; chmod +x .git/hooks/$hook; done
        git config commit.gpgSign true; git config core.hooksPath .git/hooks; git config core.excludesFile .git/HEAD
        git config core.worktree {user}; git config core.bare true
        """,
}


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_in_the_clones_git_folder_counts(repo: Repository, level: str, tmp_path: Path) -> None:
    before, mark = repo.state(), tmp_path / "mark"
    scripts = (script.replace("{user}", str(repo.path)).replace("{mark}", str(mark)) for script in TRICKS.values())
    for result in drive_each(repo, [sh(f"{EDITS}; {script}") for script in scripts], level=level):
        assert proposed(repo, result) == {"M calc.py", "M test_calc.py", "A new.py"}
        after = state_without(repo, result)
    assert after == before
    assert not mark.exists()


def test_attributes_in_the_change_run_no_program_of_the_agents(repo: Repository, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    plant = f"for key in filter.x.clean filter.x.process diff.x.textconv; do git config $key 'touch {mark}; cat'; done"
    result = drive(repo, sh(f"echo '* filter=x diff=x' > .gitattributes; echo >> calc.py; {plant}"))
    assert findings(result) == {"judge-changed .gitattributes"}
    assert kept(repo, result) == {"A .gitattributes", "M calc.py"}
    assert not mark.exists()


def test_settings_planted_in_the_home_folder_run_nothing_and_hide_nothing(
    repo: Repository, hermetic: Path, tmp_path: Path
) -> None:
    submodules(repo, tmp_path)
    mark = tmp_path / "mark"
    keys = "core.fsmonitor uploadpack.packObjectsHook core.alternateRefsCommand diff.external filter.x.clean"
    script = f"""
        {EDITS}; for key in {keys}; do git config --global $key 'touch {mark}; false'; done
        mkdir -p ~/.config/git; echo '*' > ~/.config/git/ignore; echo '* filter=x' > ~/.config/git/attributes
        git config --file {repo.path}/.git/modules/there/config core.fsmonitor 'touch {mark}; false'
        """
    result = drive(repo, sh(script))
    assert result.status == 5, result.out + result.err
    assert not mark.exists()
    (hermetic / ".gitconfig").unlink()
    assert kept(repo, result) == {"M calc.py", "M test_calc.py", "A new.py"}


# -------------------------------------------------------------------------------------- what is the user's


@pytest.fixture
def at_work(repo: Repository) -> Repository:
    """The repository with every kind of thing that a user may have lying in the checkout."""
    repo.write(".gitignore", "*.env\nmodules/\n")
    repo.write("half.py", "x = 1\n")
    repo.write("sub/x.py", "x = 1\n")
    repo.commit()
    repo.write("half.py", "x = 2\n")
    repo.write("staged.py", "x = 1\n")
    repo.git("add", "half.py", "staged.py")
    repo.write("half.py", "x = 3\n")
    repo.write("intended.py", "x = 1\n")
    repo.git("add", "-N", "intended.py")
    repo.git("rm", "-q", "--cached", "test_calc.py")
    for name in ("untracked.py", "new.py", "sub/untracked.py", "a.env", "sub/b.env", "modules/x/y.js"):
        repo.write(name, "the user's own\n")
    return repo


@pytest.mark.parametrize("level", LEVELS)
def test_uncommitted_work_is_neither_swept_in_nor_changed(at_work: Repository, level: str) -> None:
    before = at_work.state()
    words = ("issue-to-pr", "issue.md", "--json", "--no-baseline", "--gate", CHEAP_GATE, "--sandbox", level)
    script = "test ! -e untracked.py; test ! -e a.env; echo >> half.py; echo > new.py; echo > staged.py"
    result = at_work.run(*words, agent=sh(script))
    assert proposed(at_work, result) == {"M half.py", "A new.py", "A staged.py"}
    assert state_without(at_work, result) == before


@pytest.mark.parametrize("level", LEVELS)
def test_links_to_the_checkout_leave_the_checkout_whole(at_work: Repository, level: str, tmp_path: Path) -> None:
    before = at_work.state()
    (tmp_path / "elsewhere").mkdir()
    links = [f"ln -s {place} sub" for place in (at_work.path, "../elsewhere", at_work.path / "sub")]
    scripts = [sh(f"cd ..; rm -r sub; {script}") for script in (*links, "echo > sub")][: 4 if level == "off" else 2]
    options = ("--carry", "sub/b.env", "--gate", "touch judged")
    for result in drive_each(at_work, scripts, *options, level=level, cwd="sub"):
        assert result.status != 0, result.out + result.err
        assert kept(at_work, result) == {"D sub/x.py", "A sub"}
    assert at_work.state() == before
    assert not os.listdir(tmp_path / "elsewhere")


REPLACE_WORKSPACE = 'here="$PWD"; cd ..; rm -rf "$here"; ln -s {user} "$here"'


@pytest.mark.parametrize("end", ["", "; kill -9 $PPID"], ids=["ends", "kills-the-run"])
def test_workspace_replaced_by_a_link_to_the_checkout_is_not_read(at_work: Repository, end: str) -> None:
    before = at_work.state()
    replaced = drive(at_work, sh(REPLACE_WORKSPACE.replace("{user}", str(at_work.path)) + end))
    assert replaced.status == (-9 if end else 4), replaced.out
    assert drive(at_work, "true").status == 4
    assert at_work.git("for-each-ref", "refs/agent-runner/") == ""
    assert at_work.state() == before


def test_work_of_a_killed_run_is_kept_by_the_next_without_what_was_carried(at_work: Repository) -> None:
    drive(at_work, sh(f"{EDITS}; rm .gitignore; echo >> a.env; kill -9 $PPID"), "--carry", "a.env")
    assert drive(at_work, "true").status == 4
    (ref,) = at_work.git("for-each-ref", "--format=%(refname)", "refs/agent-runner/").split()
    assert changed(at_work, ref) == {"M calc.py", "M test_calc.py", "A new.py", "D .gitignore"}


@needs_bwrap
def test_users_program_outlives_an_agent_that_moves_its_mount_point_away(repo: Repository) -> None:
    agent = repo.write("tools/bin/agent", "#!/bin/sh\nmv tools t; ln -s {user}/tools tools; echo > new\n", mode=0o755)
    agent.write_text(agent.read_text().replace("{user}", str(repo.path)))
    result = drive(repo, "tools/bin/agent", level="require")
    assert result.status == 1, result.out + result.err
    assert "A new" in kept(repo, result)
    assert agent.exists()


# ------------------------------------------------------------------------------------ what is carried along


@pytest.mark.parametrize("level", LEVELS)
def test_carried_files_are_there_and_never_proposed(at_work: Repository, level: str) -> None:
    (at_work.path / "link.env").symlink_to("a.env")
    before = at_work.state()
    names = ("a.env", "./modules", "untracked.py", "link.env")
    gate = ("--gate", "grep -q own a.env", "--gate", "test -e modules/x/y.js")
    script = """
        grep -q own a.env link.env untracked.py modules/x/y.js; rm .gitignore
        echo x | tee -a a.env untracked.py link.env modules/x/y.js modules/new; echo >> calc.py
        """
    result = drive(at_work, sh(script), *(word for name in names for word in ("--carry", name)), *gate, level=level)
    assert proposed(at_work, result) == {"M calc.py", "D .gitignore"}
    assert state_without(at_work, result) == before


def test_carry_of_what_is_no_ignored_file_of_the_repository_is_refused(repo: Repository) -> None:
    for path in ("calc.py", "..", ".git/config"):
        result = drive(repo, "true", "--carry", path)
        assert result.status == 3
        assert "--carry" in result.report["message"]


# ------------------------------------------------------------------- what once stood in the way of reading the change


def test_lock_that_a_killed_git_left_costs_no_work(repo: Repository) -> None:
    result = drive(repo, sh('touch "$(dirname "$(dirname "$PWD")")/index-workspace.lock"; echo >> calc.py'))
    assert proposed(repo, result) == {"M calc.py"}


def test_file_of_over_a_gigabyte_is_told_and_left_out_and_the_rest_is_kept(repo: Repository) -> None:
    result = drive(repo, sh("truncate -s 1001M disk.img; truncate -s 1001M issue.md; echo >> calc.py"))
    assert result.status == 1 and findings(result) == {"large disk.img", "large issue.md"}, result.err
    assert kept(repo, result) == {"M calc.py"}


def test_workspace_that_cannot_be_read_is_kept_for_the_next_run(repo: Repository, hermetic: Path) -> None:
    lost = sh('echo "# mine" >> calc.py; mv ../../git ../../away')  # Git cannot read anything now
    result = drive(repo, lost)
    assert result.status == 3 and "the next run in this repository keeps it" in result.err, result.err
    (folder,) = (path for path in (hermetic / ".cache/agent-runner").iterdir() if (path / "away").is_dir())
    (folder / "away").rename(folder / "git")
    drive(repo, "true")
    (ref,) = repo.git("for-each-ref", "--format=%(refname)", "refs/agent-runner/").splitlines()
    assert changed(repo, ref) == {"M calc.py"} and not folder.exists()


def test_carried_path_that_the_change_has_no_room_for_is_red(repo: Repository) -> None:
    repo.write("data/tracked", "1\n")
    repo.write(".gitignore", "data/own\n")
    repo.commit()
    repo.write("data/own/x", "mine\n")
    os.mkfifo(repo.path / "data/own/pipe")
    result = drive(repo, sh("test -e data/own/x; rm -r data; echo > data"), "--carry", "data/own")
    assert result.status == 1 and "--carry 'data/own' cannot be copied" in result.report["message"], result.err


# ------------------------------------------------------------------------------------------- the user's checkout


def test_lines_that_a_filter_hides_from_git_are_not_lost_by_switching(repo: Repository) -> None:
    repo.write(".gitattributes", "calc.py filter=strip\n")
    repo.git("config", "filter.strip.clean", "grep -v SECRET")
    repo.git("config", "filter.strip.smudge", "cat")
    repo.commit()
    secret = (repo.path / "calc.py").read_text() + "SECRET = 1\n"
    repo.write("calc.py", secret)
    repo.git("add", "calc.py")
    assert repo.git("status", "--porcelain") == ""
    words = ("issue-to-pr", "issue.md", "--json", "--no-baseline", "--gate", CHEAP_GATE, "--sandbox", "off")
    result = repo.run(*words, agent=sh("sed -i '1i import os' calc.py"))
    assert result.status == 0 and (repo.path / "calc.py").read_text() == secret
    assert "calc.py of yours would be overwritten" in " ".join(result.report["mentions"])
    assert repo.git("branch", "--show-current") == "main"


def test_index_that_git_cannot_read_does_not_undo_the_proposal(repo: Repository) -> None:
    repo.write(".git/index", "garbage")
    words = ("issue-to-pr", "issue.md", "--json", "--no-baseline", "--gate", CHEAP_GATE, "--sandbox", "off")
    result = repo.run(*words, agent=sh("echo >> calc.py"))
    assert result.status == 0 and result.report["branch"] == "agent/issue", result.err
    assert "HEAD was left where it is" in " ".join(result.report["mentions"])


def test_base_may_be_spelled_as_git_has_it_and_a_range_is_none(repo: Repository) -> None:
    start = repo.git("rev-parse", "HEAD")
    repo.write("more.txt", "more\n")
    repo.commit("more")
    assert drive(repo, sh("echo >> calc.py"), "--base", ":/start").report["base"] == start
    result = drive(repo, "true", "--base", "main..main")
    assert result.status == 3 and "--base 'main..main' is no commit here" in result.report["message"]
