"""The judged code is the code that is imported: editable installs, PYTHONPATH, names of the standard library."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import LEVELS, Repository, Result, isolate, needs_bwrap

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the agents here are shell scripts")

# What setuptools writes for an editable install that a path entry cannot express, shortened.
FINDER = """
import sys
from importlib.machinery import PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

MAPPING = {mapping!r}


class _EditableFinder:
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname in MAPPING:
            for candidate in (Path(MAPPING[fullname], "__init__.py"), Path(MAPPING[fullname] + ".py")):
                if candidate.exists():
                    return spec_from_file_location(fullname, candidate)
        parent = fullname.rpartition(".")[0]
        return PathFinder.find_spec(fullname, path=[MAPPING[parent]]) if parent in MAPPING else None


def install():
    if not any(finder == _EditableFinder for finder in sys.meta_path):
        sys.meta_path.append(_EditableFinder)
"""


class Environment(NamedTuple):
    """A virtual environment in which pytest is at hand, and packages can be installed from a checkout."""

    path: Path

    @property
    def python(self) -> str:
        return str(self.path / "bin" / "python")

    @property
    def site(self) -> Path:
        (found,) = self.path.glob("lib/python*/site-packages")
        return found

    def add_path_entry(self, folder: Path) -> None:
        (self.site / "__editable__.pth").write_text(f"{folder}\n", encoding="utf-8")

    def add_finder(self, **mapping: Path) -> None:
        text = textwrap.dedent(FINDER).format(mapping={name: str(path) for name, path in mapping.items()})
        (self.site / "__editable___finder.py").write_text(text, encoding="utf-8")
        start = "import __editable___finder; __editable___finder.install()\n"
        (self.site / "__editable__.pth").write_text(start, encoding="utf-8")


def make_environment(path: Path) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    made = Environment(path)
    (made.site / "tools.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n", encoding="utf-8")
    (made.site / "tests.py").write_text("# bears the name of a folder of the repository's\n", encoding="utf-8")
    tool = path / "bin" / "pytest"
    tool.write_text(f"#!{made.python}\nimport pytest\nraise SystemExit(pytest.main())\n", encoding="utf-8")
    tool.chmod(0o755)
    return made


class Project(NamedTuple):
    """A checkout whose package an environment imports from where it lies."""

    repo: Repository
    environment: Environment

    @property
    def check(self) -> str:
        return f"{shlex.quote(self.environment.python)} tests/check.py"


def make_project(path: Path, environment: Path) -> Project:
    repo = Repository(path)
    path.mkdir(parents=True)
    repo.git("init", "-q", "-b", "main")
    repo.git("config", "user.name", "Ada")
    repo.git("config", "user.email", "ada@example.invalid")
    repo.write(".gitignore", ".venv/\n")
    repo.write("issue.md", "# Task\n")
    repo.write("src/shop/__init__.py", "")
    repo.write("src/code/notes.md", "A folder that bears a standard library's name, but is no module.\n")
    repo.write("src/shop/prices.py", "def double(x):\n    return x * 2\n")
    repo.write(
        "tests/check.py",
        "import sys\n\nfrom shop import prices\n\nassert getattr(prices, sys.argv[1])(3) == int(sys.argv[2])\n",
    )
    repo.write(
        "tests/test_prices.py", "from shop.prices import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
    )
    repo.commit()
    return Project(repo, make_environment(environment))


RIGHT = "printf 'def triple(x):\\n    return x * 3\\n' >> src/shop/prices.py"
WRONG = "printf 'def double(x):\\n    return x * 3\\n' >> src/shop/prices.py"


def drive(repo: Repository, command: str, *options: str, level: str, env: dict[str, str] | None = None) -> Result:
    words = ("issue-to-pr", "issue.md", "--json", "--no-baseline", "--no-switch", "--sandbox", level, *options)
    return repo.run(*words, agent=command, env=env)


def sh(script: str) -> str:
    """An agent of a line of shell."""
    return shlex.join(["sh", "-ec", script])


def is_judged_on_its_own_code(repo: Repository, check: str, *, level: str, env: dict[str, str] | None = None) -> bool:
    """A change is proposed that the checkout's code would fail with, another rejected that it would pass with.

    The agent sees its own code, too.
    """
    cases = ((f"{RIGHT}; {check} triple 9", f"{check} triple 9"), (WRONG, f"{check} double 6"))
    with ThreadPoolExecutor(2) as pool:
        right, wrong = pool.map(lambda case: drive(repo, sh(case[0]), "--gate", case[1], level=level, env=env), cases)
    assert right.status == 0, right.out + right.err
    assert wrong.status == 1, wrong.out + wrong.err
    return not right.report["findings"]


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Project]:
    """One project for each way of installing it, and each place of the environment."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        top = tmp_path_factory.mktemp("projects")
        isolate(patch, top / "home")
        for way in ("path-entry", "import-hook"):
            for place in ("inside", "outside"):
                path = top / f"{way} {place}"
                project = make_project(path / "app", path / ("app/.venv" if place == "inside" else "env"))
                if way == "path-entry":
                    project.environment.add_path_entry(project.repo.path / "src")
                else:
                    project.environment.add_finder(shop=project.repo.path / "src" / "shop")
                made[way, place] = project
    return made


@pytest.mark.parametrize(
    ("way", "place", "level"),
    [
        *((way, place, "off") for way in ("path-entry", "import-hook") for place in ("inside", "outside")),
        pytest.param("path-entry", "outside", "require", marks=needs_bwrap),
        pytest.param("import-hook", "inside", "require", marks=needs_bwrap),
    ],
)
def test_editable_install_is_judged_on_the_changed_code(
    projects: dict[tuple[str, str], Project], way: str, place: str, level: str
) -> None:
    project = projects[way, place]
    assert is_judged_on_its_own_code(project.repo, project.check, level=level)


def test_repair_of_an_editable_install_is_proposed_and_a_wrong_one_is_not(
    projects: dict[tuple[str, str], Project],
) -> None:
    project = projects["import-hook", "inside"]
    repo = project.repo
    repo.write("src/shop/prices.py", "def double(x):\n    return x + 2\n")
    repo.commit("break it")
    gate = f"{shlex.quote(project.environment.python)} -m pytest -q"
    words = ("self-heal", "--json", "--gate", gate, "--no-switch", "--attempts", "1", "--sandbox", "off")
    agents = [shlex.join(["sed", "-i", f"s/x + 2/x {term}/", "src/shop/prices.py"]) for term in ("* 2", "+ 4")]
    with ThreadPoolExecutor(2) as pool:
        right, wrong = pool.map(lambda agent: repo.run(*words, agent=agent), agents)
    repo.git("reset", "-q", "--hard", "HEAD~1")
    assert right.status == 0, right.out + right.err
    assert wrong.status == 2, wrong.out + wrong.err


def test_interpreter_behind_a_shell_is_found(projects: dict[tuple[str, str], Project]) -> None:
    project = projects["path-entry", "outside"]
    gate = shlex.join(["sh", "-c", f"{project.check} triple 9"])
    assert drive(project.repo, sh(RIGHT), "--gate", gate, level="off").status == 0


def test_setup_sees_the_clone_too(projects: dict[tuple[str, str], Project]) -> None:
    project = projects["import-hook", "outside"]
    setup = "import os, shop; assert shop.__file__.startswith(os.getcwd()), shop.__file__"
    words = ("--setup", shlex.join([project.environment.python, "-c", setup]), "--gate", f"{project.check} triple 9")
    result = drive(project.repo, sh(RIGHT), *words, level="off")
    assert result.status == 0, result.out + result.err


@pytest.mark.parametrize("level", LEVELS)
def test_linked_worktree_with_the_main_ones_environment_is_judged_on_its_own_code(
    projects: dict[tuple[str, str], Project], level: str, tmp_path: Path
) -> None:
    main, check = projects["path-entry", "inside"].repo, projects["path-entry", "inside"].check
    main.git("worktree", "add", "-q", "--force", str(tmp_path / "side"))
    assert is_judged_on_its_own_code(Repository(tmp_path / "side"), check, level=level)


@pytest.mark.parametrize(
    ("spelled", "level"),
    [("as-it-is", "off"), ("through-a-link", "off"), pytest.param("through-a-link", "require", marks=needs_bwrap)],
)
def test_pythonpath_into_the_checkout_is_followed_to_the_clone(
    projects: dict[tuple[str, str], Project], level: str, spelled: str, tmp_path: Path
) -> None:
    repo = projects["path-entry", "outside"].repo
    (tmp_path / "link").symlink_to(repo.path)
    place = repo.path if spelled == "as-it-is" else tmp_path / "link"
    env = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(place / "src")))}
    assert is_judged_on_its_own_code(repo, f"{shlex.quote(sys.executable)} tests/check.py", level=level, env=env)


def test_pythonpath_is_followed_where_the_user_wants_a_standard_librarys_name_first(repo: Repository) -> None:
    repo.write("this.py", "x = 1\n")
    repo.write("checks/check.py", "import calc\n\nassert calc.triple(3) == 9\n")
    repo.commit()
    gate = shlex.join([sys.executable, "checks/check.py"])
    script = RIGHT.replace("src/shop/prices.py", "calc.py")
    result = drive(repo, sh(script), "--gate", gate, level="off", env={"PYTHONPATH": str(repo.path)})
    assert result.status == 0, result.out + result.err
    assert not result.report["findings"]


@pytest.mark.parametrize("level", LEVELS)
def test_script_of_the_gates_that_no_commit_holds_runs_beside_the_changed_code(repo: Repository, level: str) -> None:
    repo.write("check.py", "import calc\n\nassert calc.triple(3) == 9\n")
    repo.write("right.sh", RIGHT.replace("src/shop/prices.py", "calc.py"))
    repo.write("wrong.sh", "echo >> calc.py")
    check = shlex.join([sys.executable, "-S", "check.py"])
    # No other command sees it, nor the agent's script: no proposal holds them.
    gate = [word for command in (check, "test ! -e check.py", "test ! -e right.sh") for word in ("--gate", command)]
    with ThreadPoolExecutor(2) as pool:
        agents = ("sh right.sh", "sh wrong.sh")
        right, wrong = pool.map(lambda command: drive(repo, command, *gate, level=level), agents)
    assert right.status == 0, right.out + right.err
    assert wrong.status == 1, wrong.out + wrong.err


@pytest.mark.parametrize("level", LEVELS)
def test_module_with_a_standard_librarys_name_does_not_break_the_gate_and_is_reported(
    tmp_path: Path, level: str
) -> None:
    repo, environment = make_project(tmp_path / "app", tmp_path / "env")
    repo.write("queue.py", "raise SystemExit('this is not the standard library')\n")
    repo.write("calc.py", "x = 1\n")
    repo.commit()
    environment.add_path_entry(repo.path)
    gate = ("--gate", f"{environment.path}/bin/pytest -q tests/test_calc.py")
    script = "printf 'import calc\\n\\n\\ndef test_x():\\n    assert calc.x == 1\\n' > tests/test_calc.py"
    result = drive(repo, sh(script), *gate, level=level)
    assert result.status == 0, result.out + result.err
    found = [finding["path"] for finding in result.report["findings"] if finding["kind"] == "unfaithful"]
    assert ("calc" in found) == (level == "off"), found


@needs_bwrap
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_environment_cannot_be_written_under_the_kernel_level(
    projects: dict[tuple[str, str], Project], place: str
) -> None:
    repo, environment = projects["path-entry", place]
    planted = environment.site / "planted.pth"
    gate = shlex.join([environment.python, "-c", "pass"])
    result = drive(repo, sh(f"touch {shlex.quote(str(planted))} || {RIGHT}"), "--gate", gate, level="require")
    assert result.status == 0, result.out + result.err
    assert not planted.exists()


PLANT = """
import os, sys
counter, text, places = sys.argv[1], sys.argv[2], sys.argv[3:]
open("calc.py", "w").write("def double(x):\\n    return x * 2\\n")
turn = len(open(counter).read()) if os.path.exists(counter) else 0
open(counter, "a").write("x")
for path in places[:turn]:
    if os.path.exists(path) and open(path).read() == "# planted\\n":
        os.unlink(path)
for path in places if text == "all" else places[turn:turn + 1]:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "a").write("# planted\\n")
    except OSError as error:
        print(error)
"""


class Planted(NamedTuple):
    """An agent that mends the code and writes to the judge's ground, and where it writes."""

    agent: str
    words: list[str]
    places: list[Path]
    above: Path


def plant(repo: Repository, tmp_path: Path, home: Path, *, level: str, turns: str) -> Planted:
    environment = make_environment(tmp_path / "env")
    (environment.site / "old-1.dist-info").mkdir()
    check = environment.path / "bin/check"  # red until the code is mended, and no more
    text = "import pathlib, sys\nsys.exit('+' in pathlib.Path('calc.py').read_text())\n"
    check.write_text(f"#!{environment.python}\n{text}", encoding="utf-8")
    check.chmod(0o755)
    user = home / ".local/lib/python3.11/site-packages"
    for folder in (user, tmp_path / "bin"):
        folder.mkdir(parents=True)
    (tmp_path / "plant.py").write_text(PLANT, encoding="utf-8")
    above = (repo.path.parent if level == "require" else home / ".cache/agent-runner") / "pytest.ini"
    places = [
        user / "usercustomize.py",
        environment.site / "new.pth",
        environment.site / "sitecustomize.py",
        environment.site / "old-1.dist-info/entry_points.txt",
        environment.site / "new-1.dist-info/entry_points.txt",
        check,
        tmp_path / "bin" / "ruff",
        home / ".config/ruff/ruff.toml",
        above,
    ]
    words = [sys.executable, "-S", str(tmp_path / "plant.py"), str(tmp_path / "counter"), turns, *map(str, places)]
    gate = ["--gate", str(check), "--gate", "ruff check calc.py"]
    options = ["self-heal", "--json", "--no-switch", "--sandbox", level, *gate]
    return Planted(shlex.join(words), options, places, above)


def test_whatever_an_agent_plants_on_the_judges_ground_rejects(
    broken: Repository, tmp_path: Path, hermetic: Path
) -> None:
    planted = plant(broken, tmp_path, hermetic, level="off", turns="one")
    path = os.pathsep.join((str(tmp_path / "bin"), os.environ["PATH"]))
    words = [*planted.words, "--attempts", str(len(planted.places))]
    result = broken.run(*words, agent=planted.agent, env={"PATH": path})
    assert result.status == 2, result.err
    for attempt, place in zip(result.report["attempts"], planted.places, strict=True):
        told = {check["name"]: check for check in attempt["gate"]}
        assert not told["integrity"]["passed"] and str(place) in told["integrity"]["reason"], (place, attempt)


@needs_bwrap
def test_what_can_be_planted_on_the_judges_ground_under_the_kernel_level_rejects(
    broken: Repository, tmp_path: Path, hermetic: Path
) -> None:
    home = hermetic
    planted = plant(broken, tmp_path, home, level="require", turns="all")
    path = os.pathsep.join((str(tmp_path / "bin"), os.environ["PATH"]))
    result = broken.run(*planted.words, "--attempts", "1", agent=planted.agent, env={"PATH": path})
    made = {str(place) for place in planted.places if place.exists() and "# planted" in place.read_text()}
    assert made == {str(home / ".config/ruff/ruff.toml"), str(planted.above)}, "folders that tools may write to"
    assert result.status == 2 and {finding["path"] for finding in result.report["findings"]} == made


@needs_bwrap
@pytest.mark.parametrize("place", ["", "backend"], ids=["top", "folder"])
def test_environment_that_also_holds_tracked_code_does_not_stand_in_for_it(
    broken: Repository, tmp_path: Path, place: str
) -> None:
    """The user's uncommitted fix must not be what is judged, nor their files be seen."""
    code = Path(place, "calc.py")
    if place:
        (broken.path / place).mkdir()
        for name in ("calc.py", "test_calc.py"):
            broken.git("mv", name, f"{place}/{name}")
        broken.commit("a folder")
    environment = make_environment(broken.path / place)
    (broken.path / code).write_text("def double(x):\n    return x * 2\n", encoding="utf-8")
    gate = f"{shlex.quote(environment.python)} -m pytest -q {code.parent / 'test_calc.py'}"
    words = ("self-heal", "--json", "--no-switch", "--sandbox", "require", "--gate", gate, "--attempts", "1")
    result = broken.run(
        *words, agent=sh(f"grep -q '+ 2' {code}; echo >> {code}"), env={"VIRTUAL_ENV": str(environment.path)}
    )
    assert result.status == 2 and "1 of 1 tests failed" in result.report["message"], result.err
