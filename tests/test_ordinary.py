"""What is green in the user's checkout is green here: the kinds of repositories people have."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import CHEAP_GATE, LEVELS, Repository, Result, needs_bwrap

CHEAP = ("--gate", CHEAP_GATE, "--no-baseline")
PYTEST = ("--gate", f"{sys.executable} -m pytest -q -p no:cacheprovider")


def sh(script: str) -> str:
    """A command of a line or more of shell."""
    return shlex.join(["sh", "-ec", script])


EDIT = sh("echo '# mine' >> calc.py")


@pytest.fixture(autouse=True)
def identity(hermetic: Path) -> None:
    """Who commits, for the repositories that a test makes by cloning."""
    text = '[user]\nname = Ada\nemail = ada@example.invalid\n[protocol "file"]\nallow = always\n'
    (hermetic / ".gitconfig").write_text(text)


def drive(repo: Repository, agent: str, *words: str, level: str = "off", **how: Any) -> Result:
    issue = os.path.relpath(repo.path / "issue.md", repo.path / how.get("cwd", ""))
    options = ("--json", "--no-switch", "--sandbox", level)
    return repo.run("issue-to-pr", issue, *options, *words, agent=agent, **how)


def propose(repo: Repository, agent: str, *words: str, **how: Any) -> dict[str, Any]:
    result = drive(repo, agent, *words, **how)
    assert result.status == 0, result.err
    return result.report


def proposed_alone(repo: Repository, report: dict[str, Any], before: dict[str, str]) -> list[str]:
    """The files of a proposal; beside its branch, nothing of the user's has changed."""
    names = repo.git("diff", "--name-only", report["base"], report["branch"]).splitlines()
    repo.git("branch", "-q", "-D", report["branch"])
    assert repo.state() == before
    return names


def by_hand(folder: Path, script: str) -> None:
    done = subprocess.run(["sh", "-ec", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def at_levels(names: str) -> list[Any]:
    """Names, each with the level at which it is tried."""
    marks = {"off": (), "require": needs_bwrap}
    pairs = [name.split(":") for name in names.split()]
    return [pytest.param(name, level, marks=marks[level]) for name, level in pairs]


# --------------------------------------------------------------------------- kinds of repositories

# What makes one => what is then green by hand, in the folder and with the edited file below.
KINDS = {
    "names": """git tag -a v2.1.0 -m x; git clone -q --bare . ../o.git
        git remote add origin ../o.git; git fetch -q; git remote set-head origin main
        git switch -qc work/a; git commit -q --allow-empty -m more; git tag later
        => git describe --match 'v*' | grep -q ^v2.1.0-; git diff --check origin/main...HEAD
        test "$(git branch --show-current)" = work/a; git log -1 main later origin/HEAD""",
    "detached": 'git checkout -q --detach => test -z "$(git branch --show-current)"; git log',
    "shallow": """git commit -q --allow-empty -m two; git clone -q --depth 1 "file://$PWD" ../side
        => git rev-parse --is-shallow-repository | grep true; git log""",
    "autocrlf": "git config --global core.autocrlf true; AGAIN => CR",
    "eol": "echo '* text=auto' > .gitattributes; COMMIT; git config core.eol crlf; AGAIN => CR",
    "attributes": "echo '*.py text eol=crlf' > .gitattributes; COMMIT; AGAIN => CR",
    "local_filter": """echo '*.txt filter=up' >> .git/info/attributes
        git config filter.up.clean 'tr a-z A-Z'; git config filter.up.smudge 'tr A-Z a-z'
        echo loud > loud.txt; COMMIT => grep loud loud.txt; git show HEAD:loud.txt | grep LOUD""",
    "global_filter": """git config --global core.attributesFile ~/at; echo '*.txt filter=u' > ~/at
        git config --global filter.u.clean 'tr a-z A-Z'
        git config --global filter.u.smudge 'tr A-Z a-z'; echo loud > loud.txt; COMMIT
        => grep -q loud loud.txt; git show HEAD:loud.txt | grep LOUD""",
    "submodules": """git clone -q . ../lib; git clone -q . ../deep
        cd ../lib; git remote rm origin; git submodule --quiet add ../deep deep; git commit -qm deep
        cd ../app; git submodule --quiet add ../lib there; git submodule --quiet add ../lib absent
        COMMIT; git submodule --quiet update --init --recursive
        git submodule --quiet deinit -f absent; rm -rf ../lib ../deep
        => grep double there/calc.py; grep double there/deep/calc.py; test -z "$(ls absent)" """,
    "work_tree": 'git worktree add -q ../side => test "$(git branch --show-current)" = side',
    "work_tree_inside": "git worktree add -q side => git rev-parse HEAD main",
    "sha256": """git init -q -b main --object-format=sha256 ../side; cp *.* ../side
        cd ../side; COMMIT => git rev-parse --show-object-format | grep sha256""",
    "odd_path": "cp -r . \"../Ä 'p' [1] & \\$x\" => git log -1",
}
SHORT = {"COMMIT": "git add .; git commit -qm more", "AGAIN": "rm *.py; git checkout -q ."}
SHORT |= {"CR": "grep -q \"$(printf '\\r')\" calc.py"}
FOLDERS = dict.fromkeys(("shallow", "work_tree", "sha256"), "../side")
FOLDERS |= {"work_tree_inside": "side", "odd_path": "../Ä 'p' [1] & $x"}
TRIED = """names:off names:require submodules:off submodules:require work_tree:off work_tree:require
    global_filter:off detached:off autocrlf:off eol:off attributes:off shallow:off
    sha256:require work_tree_inside:require odd_path:require local_filter:require"""


@pytest.mark.parametrize(("kind", "level"), at_levels(TRIED))
def test_green_by_hand_is_green_and_proposed(repo: Repository, kind: str, level: str) -> None:
    text = re.sub("|".join(SHORT), lambda match: SHORT[match[0]], KINDS[kind])
    setup, check = text.split("=> ")
    by_hand(repo.path, setup)
    made = Repository(repo.path / FOLDERS.get(kind, ""))
    by_hand(made.path, check)
    before, edited = made.state(), "loud.txt" if "filter" in kind else "calc.py"
    check += '\ntest -z "$(git status --porcelain)"'
    agent = sh(f'{check}\ntest -z "$(git remote)"; echo "# mine" >> {edited}')
    report = propose(made, agent, "--gate", sh(check), level=level)
    counts = made.git("diff", "--numstat", "--summary", report["base"], report["branch"])
    assert counts == f"1\t0\t{edited}" and made.tree(report["branch"]) == report["tree"]
    assert proposed_alone(made, report, before) == [edited]


@pytest.mark.skipif(not shutil.which("git-lfs"), reason="git-lfs is not installed")
@pytest.mark.parametrize("level", LEVELS)
def test_large_files_go_to_the_users_own_store(repo: Repository, level: str) -> None:
    make = "head -c {0} /dev/zero | tr '\\0' x > {1}.bin"
    where = "--local" if level == "off" else ""
    by_hand(repo.path, f"git lfs install {where}; git lfs track '*.bin'; {make.format(3000, 1)}")
    repo.commit()
    check = "test $(wc -c < 1.bin) = 3000"
    gate = sh(f'{check}; test -z "$(git status --porcelain)"; test ! -e bad.bin')
    for name, status in (("new", 0), ("bad", 1)):
        words = ("issue-to-pr", "issue.md", "--json", "--sandbox", level, "--gate", gate)
        result = repo.run(*words, agent=sh(f"{check}; {make.format(5000, name)}"))
        assert result.status == status, result.err
        pointer = repo.git("show", f"{result.report['branch'] or result.report['kept']}:{name}.bin")
        found = re.search("oid sha256:(.*)", pointer)
        assert found and list((repo.path / ".git/lfs/objects").rglob(found[1]))
    assert repo.git("status", "--porcelain") == ""
    assert (repo.path / "new.bin").stat().st_size == 5000, "switched to, with its content"


# ---------------------------------------------------------- environments, packages, ignored files


LENT = """node_modules:require packages/web/node_modules:off web/node_modules:require .venv:off
    link:off link:require"""


@pytest.mark.parametrize(("place", "level"), at_levels(LENT))
def test_lent_is_never_proposed(repo: Repository, tmp_path: Path, place: str, level: str) -> None:
    repo.write("packages/web/tracked", "x\n")
    repo.write(".gitignore", "" if place == ".venv" else "node_modules\n")
    repo.commit()
    if place == "link":
        place = "node_modules"
        (repo.path / place).symlink_to(tmp_path / "apart")
        (tmp_path / "apart").mkdir()
    for name, text in (("x/own", "the user's\n"), ("pyvenv.cfg", "home = /usr/bin\n")):
        repo.write(f"{place}/{name}", text)
    before = repo.state()
    gate, write = f"grep user {place}/x/own", f"touch {place}/new || echo >> {place}/x/own"
    write = write if level == "require" else "false"
    agent = sh(f"{gate}; if {write}; then exit 9; fi; echo >> calc.py")
    report = propose(repo, agent, "--gate", gate, level=level)
    assert proposed_alone(repo, report, before) == ["calc.py"]


FINDER = """
import sys
from importlib.util import spec_from_file_location
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "shop":
            return spec_from_file_location(name, {0!r} + "/shop/__init__.py")
sys.meta_path.append(Finder)
"""


WAYS = "inside:require activated:off linked:off linked:require finder:off finder:require folder:off"


@pytest.mark.parametrize(("way", "level"), at_levels(WAYS))
def test_checkout_supplies_no_code(repo: Repository, tmp_path: Path, way: str, level: str) -> None:
    inside, source = repo.path / ".venv", repo.path / "src"
    environment = tmp_path / "env" if way in ("activated", "linked") else inside
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    if way == "linked":
        inside.symlink_to(environment)
    (site / "finder.py").write_text(FINDER.format(str(source)))
    (site / "shop.pth").write_text("import finder\n" if way == "finder" else f"{source}\n")
    for name, text in {"__init__": "", "extra": "", "prices": "ONE = 1\n"}.items():
        repo.write(f"src/shop/{name}.py", text)
    repo.write("docs/code.md", "What the code is.\n")
    repo.write(".gitignore", ".venv\n")
    repo.commit()
    check = "python -c 'import shop.extra, shop.prices; print(shop.prices.ONE{0})'"
    by_hand(tmp_path, f"{environment}/bin/{check.format('')}")
    how: dict[str, Any] = {"level": level, "cwd": "docs" if way == "folder" else ""}
    how["env"] = {"VIRTUAL_ENV": str(environment)} if way == "activated" else {}
    words, top = ("--no-baseline", "--gate", check.format(", shop.prices.TWO")), "src/shop"
    edit = f"echo TWO = 2 >> {'../' if way == 'folder' else ''}{top}/prices.py"
    right = drive(repo, sh(f"{edit}; {words[-1]}"), *words, **how)
    assert right.status == 0, right.err
    remove = f"cd ./$(git rev-parse --show-cdup); rm {top}/extra.py"
    gone = drive(repo, sh(f"{edit}; {remove}"), *words, **how)
    assert gone.status == 1 and "No module named 'shop.extra'" in gone.err


@pytest.mark.parametrize("level", LEVELS)
def test_environment_of_the_setup_wins(repo: Repository, level: str) -> None:
    repo.write(".venv/bin/tool", "#!/bin/sh\nexit 1\n", mode=0o755)
    repo.write(".venv/bin/__pycache__/tool.pyc", "")
    repo.write(".venv/pyvenv.cfg", "home = /usr/bin\n")
    repo.write(".gitignore", ".venv/\n")
    repo.commit()
    before = repo.state()
    make = "mkdir -p .venv/bin; printf '#!/bin/sh\\n' > .venv/bin/tool; chmod +x .venv/bin/tool"
    result = drive(repo, EDIT, "--setup", sh(make), "--gate", "tool", level=level)
    assert "exit 1" in (repo.path / ".venv/bin/tool").read_text()
    assert result.status == 0, result.err
    assert proposed_alone(repo, result.report, before) == ["calc.py"]


def test_setup_that_fails_refuses_with_its_own_words(repo: Repository) -> None:
    report = drive(repo, EDIT, *CHEAP, "--setup", sh("echo no such index >&2; exit 1")).report
    assert (report["outcome"], report["kept"]) == ("refused", None)
    assert "--setup" in report["message"] and "no such index" in report["message"]


@pytest.mark.parametrize("level", LEVELS)
def test_carry_that_mends_the_base_is_named(repo: Repository, level: str) -> None:
    repo.write(".gitignore", "_version.py\nlocal settings/\n__pycache__/\n")
    repo.commit()
    for name in ("_version.py", "local settings/a.env", "__pycache__/x.pyc"):
        repo.write(name, "KEY=1\n")
    before, check = repo.state(), "test -e _version.py; grep -q KEY 'local settings/a.env'"
    red = drive(repo, EDIT, "--gate", sh(check), level=level)
    message = red.report["message"]
    assert red.status == 3 and message.index("--carry") < message.index("self-heal")
    carried = re.search(r"with ((--carry ('[^']*'|[^\s',]+) ?)+)", message)
    assert carried and "pycache" not in carried[1]
    agent = sh(f"{check}; echo x >> _version.py; echo x >> 'local settings/a.env'; echo >> calc.py")
    words = ("--gate", sh(check), *shlex.split(carried[1]))
    assert proposed_alone(repo, propose(repo, agent, *words, level=level), before) == ["calc.py"]


@pytest.mark.parametrize("level", LEVELS)
def test_unix_socket_fits_into_a_tests_folder(repo: Repository, level: str) -> None:
    text = "import socket\n\n\ndef test_server_that_listens_on_a_socket_of_its_own(tmp_path):\n"
    text += "    socket.socket(socket.AF_UNIX).bind(str(tmp_path / 'server.socket'))\n"
    repo.write("test_socket.py", text)
    repo.commit()
    propose(repo, EDIT, "--no-baseline", *PYTEST, level=level)


def test_change_outside_the_folder_of_the_gate_is_told(repo: Repository) -> None:
    for name in ("api", "web"):
        repo.write(f"packages/{name}/code.py", "x = 1\n")
    repo.commit()
    words, told = ("--no-baseline", "--gate", "grep -q 1 code.py"), "packages/{}/code.py"
    agent = sh("echo '# 1' >> code.py; echo 'x = 2' > ../web/code.py")
    result = drive(repo, agent, *words, cwd="packages/api")
    assert result.status == 0 and "packages/api" in result.err.partition("▸")[0]
    paths = [found["path"] for found in result.report["findings"]]
    assert told.format("web") in paths and told.format("api") not in paths


# ------------------------------------------------------------------- the base, others, and agents


def test_flaky_test_of_others_rejects_nothing_and_is_named(repo: Repository) -> None:
    text = "import os\n\n\ndef test_other():\n    armed = os.path.expanduser('~/armed')\n"
    text += (
        "    assert not os.path.exists(armed) or os.unlink(armed)\n    open(f'{armed}-not', 'w')\n"
    )
    repo.write("test_other.py", text)
    repo.commit()
    wait = "while ! test -e ~/armed-not; do sleep 0.01; done"  # it has passed at the base
    report = propose(repo, sh(f"{wait}; echo >> calc.py; touch ~/armed"), *PYTEST)
    told = [text for text in report["mentions"] if "test_other" in text]
    assert told and "flaky" in told[0]


@pytest.mark.parametrize("level", LEVELS)
def test_base_that_is_red_only_beside_the_agent_is_green(repo: Repository, level: str) -> None:
    wait = "while ! test -e ~/{}; do sleep 0.01; done; "
    gate = wait.format("started") + "! test -e ~/lock || { touch ~/seen; exit 1; }"
    agent = "touch ~/lock ~/started; " + wait.format("seen") + "rm ~/lock; echo >> calc.py"
    propose(repo, sh(agent), "--gate", sh(gate), level=level)


def test_failure_from_before_blocks_no_issue_and_is_told(repo: Repository) -> None:
    repo.write("test_licence.py", "def test_licence():\n    raise ConnectionError\n")
    repo.commit()
    report = propose(repo, EDIT, *PYTEST)
    assert any("test_licence" in text and "red" in text for text in report["mentions"])
    worse = drive(repo, sh("echo 'double = None' >> calc.py"), *PYTEST)
    assert worse.status == 1 and "test_double" in worse.report["message"]


def test_command_that_is_red_from_before_can_be_left_out_as_printed(repo: Repository) -> None:
    keep = ("--gate", CHEAP_GATE, "--gate-timeout", "77")
    red = drive(repo, EDIT, *keep, "--gate", "false")
    message = red.report["message"]
    assert red.status == 3 and "--gate-timeout 77" in message[message.index("self-heal") :]
    printed = shlex.split(message.partition("out of the gate: ")[2].partition(". To have")[0])
    assert printed[2:] == ["issue-to-pr", "issue.md", *printed[4:]], message
    assert "false" not in printed and CHEAP_GATE in printed and "--gate-timeout" in printed


@pytest.mark.parametrize("command", ["issue-to-pr issue.md", "self-heal --attempts 3"])
def test_agent_that_did_nothing_is_quoted_at_the_end(broken: Repository, command: str) -> None:
    agent = sh("seq 300; echo 'Usage limit reached; it resets at 5 pm'")
    result = broken.run(*command.split(), *PYTEST, "--sandbox", "off", agent=agent)
    head, _, ending = result.out.rpartition("(exit ")
    assert result.status == (4 if command[0] == "i" else 2), result.out
    assert "changed nothing" in ending and "Usage limit reached" in ending
    assert head.count("the agent works") == 1, "the next attempt is not spent on the same"


@pytest.mark.parametrize("level", LEVELS)
def test_work_of_an_agent_that_ends_badly_is_kept(repo: Repository, level: str) -> None:
    agent = sh("echo '# done' >> calc.py; echo '401 at the last moment'; exit 3")
    result = drive(repo, agent, *CHEAP, level=level)
    assert result.status == 4 and result.report["branch"] is None
    assert "401 at the last moment" in result.err.rpartition("(exit ")[2]
    take = re.search(r"take it over: *(git .*)", result.err)
    assert take and "# done" in repo.git("show", f"{result.report['kept']}:calc.py")
    by_hand(repo.path, take[1])
    assert "# done" in (repo.path / "calc.py").read_text()


@pytest.mark.parametrize("level", LEVELS)
def test_two_runs_at_once_both_propose(repo: Repository, level: str) -> None:
    """Each agent waits for the other's, so that the runs do overlap."""
    meet = "touch ~/{0}; while ! test -e ~/{1}; do sleep 0.01; done; echo > {0}.py"
    agents = [sh(meet.format("a", "b")), sh(meet.format("b", "a"))]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda agent: propose(repo, agent, *CHEAP, level=level), agents))
    assert {report["branch"] for report in reports} == {"agent/issue", "agent/issue-2"}
    for report, name in zip(reports, ("a.py", "b.py"), strict=True):
        assert repo.git("diff", "--name-only", "main", report["branch"]) == name
