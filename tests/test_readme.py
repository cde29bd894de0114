"""What a newcomer reads and installs: README, help, pictures, changelog, package."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import agent_runner
from conftest import PROGRAM, ROOT, Repository, bwrap_works
from pictures import PICTURES, README, SESSION, fresh_clone, run_sessions, settled, shown_in

TEXT = README.read_text(encoding="utf-8")
COMMANDS = ("issue-to-pr", "self-heal")


@pytest.fixture(scope="module")
def sessions() -> dict[str, str]:
    """What the runs that the README shows print now."""
    return run_sessions()


def test_session_in_the_readme_is_what_the_program_prints(sessions: dict[str, str]) -> None:
    shown = SESSION.search(TEXT)
    assert shown and shown["words"] in TEXT.split("```sh")[1].split("```")[0]
    assert settled(shown["text"]) == settled(sessions[shown["words"]]), "run: python tests/pictures.py"


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_what_the_program_prints(sessions: dict[str, str], name: str) -> None:
    svg = (ROOT / name).read_text(encoding="utf-8")
    assert settled(shown_in(svg)) == settled(sessions[PICTURES[name]]), "run: python tests/pictures.py"
    assert f"]({name})" in TEXT
    assert len(svg) < 10_000


def rows(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, as their cells."""
    part = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in part.split("\n") if line.startswith("| ")][2:]


def test_readme_documents_every_key_of_the_report() -> None:
    schema = json.loads((ROOT / "tests" / "report.schema.json").read_text(encoding="utf-8"))
    told = {key: told for keys, told in rows("The record") for key in re.findall(r"`(\w+)`", keys)}
    assert told.keys() == schema["properties"].keys() == set(schema["required"])
    inner = {key: value.get("items", value).get("properties", {}) for key, value in schema["properties"].items()}
    inner["gate"] = schema["$defs"]["gate"]["items"]["properties"]
    for key, properties in inner.items():
        assert {name for name in properties if f"`{name}`" not in told[key]} == set(), key


def test_readme_tells_every_outcome_and_exit_status() -> None:
    told = {name.strip("`"): status for name, status, _ in rows("Outcomes")}
    assert told.pop("interrupted") == "130, 143, 129"
    assert told.pop("–") == str(agent_runner.FAULT)
    expected = {name: str(status) for name, status in agent_runner.OUTCOMES.items() if name != "interrupted"}
    assert told == expected


def help_of(*words: str) -> str:
    done = subprocess.run([sys.executable, str(PROGRAM), *words, "--help"], capture_output=True, check=True)
    return done.stdout.decode()


def test_readme_names_no_option_that_is_not_there() -> None:
    options = set(re.findall(r"--[a-z-]+", "".join(help_of(command) for command in COMMANDS)))
    spans = re.findall(r"`(--[^`]+|python3 agent_runner\.py [^`]+)`", TEXT)
    named = {word for span in spans for word in re.findall(r"(?<!\S)--[a-z-]+", re.sub(r"'[^']*'", "", span))}
    assert len(named) > 10
    assert named - {"--no-verify", "--spec", "--from"} <= options


@pytest.mark.parametrize("words", [(), *((command,) for command in COMMANDS)])
def test_help_fits_one_screen(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = help_of(*words).split("\n")
    assert len(lines) <= 41 and max(map(len, lines)) <= 79
    assert len(lines[0]) < 60


@pytest.mark.parametrize("command", COMMANDS)
def test_help_groups_the_options_and_shows_examples_and_statuses(command: str) -> None:
    text = help_of(command)
    assert re.findall(r"^([a-z ]+):$", text, re.MULTILINE) == [
        "agent",
        "gate",
        "place",
        "output",
        "examples",
        "exit statuses",
    ]
    examples = re.findall(rf"^  python3 agent_runner\.py ({command} .*)$", text, re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        assert agent_runner.parse_settings(shlex.split(example)).command == command
    statuses = {int(number) for number in re.findall(r"\b\d+\b", text.partition("exit statuses:")[2])}
    assert statuses == {*agent_runner.OUTCOMES.values(), agent_runner.FAULT, 129, 143}


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("--atempts", "--attempts"),
        ("--gates", "--gate"),
        ("--simulat=bad", "--simulate"),
        ("--nobaseline", "--no-baseline"),
    ],
)
def test_unknown_option_suggests_the_near_one(given: str, near: str) -> None:
    with pytest.raises(agent_runner.Refusal, match=f"did you mean {near}\\?"):
        agent_runner.parse_settings(["self-heal", given])


def test_every_relative_link_leads_somewhere() -> None:
    for page in ROOT.glob("*.md"):
        text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert re.match(r"https?:", target) or (ROOT / target).exists(), f"{page.name}: {target}"


def block(marker: str) -> str:
    """The code block that follows a marker, without its indentation."""
    found = re.search(rf"^( *)<!-- {marker} -->\n *```\w+\n(.*?)^ *```", TEXT, re.DOTALL | re.MULTILINE)
    assert found
    return re.sub(rf"^{found[1]}", "", found[2], flags=re.MULTILINE)


def python3_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `python3` be the Python of the tests."""
    folder.mkdir()
    (folder / "python3").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", os.pathsep.join((str(folder), os.environ["PATH"])))


def test_the_agent_of_the_readme_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python3_on_path(tmp_path / "bin", monkeypatch)
    made = fresh_clone(tmp_path)
    done = subprocess.run(["sh", "-ec", block("own-agent")], cwd=made.path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert "test_total_less_a_discount passes without the change too" in done.stdout.decode()


def test_the_job_of_the_readme_that_heals_a_red_branch_works_as_written(
    broken: Repository, agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python3_on_path(tmp_path / "bin", monkeypatch)
    (tmp_path / "bin" / "gh").write_text('#!/bin/sh\necho "$@" >gh.txt\n', encoding="utf-8")
    (tmp_path / "bin" / "gh").chmod(0o755)
    broken.write("agent_runner.py", PROGRAM.read_text(encoding="utf-8"))
    broken.commit()
    subprocess.run(["git", "clone", "-q", "--bare", str(broken.path), str(tmp_path / "forge.git")], check=True)
    mend = agent('import pathlib\npathlib.Path("calc.py").write_text("def double(x):\\n    return x * 2\\n")\n')
    monkeypatch.setenv("AGENT_CMD", mend)
    scripts = re.findall(r"^ +run: \|\n((?: {10,}.*\n)+)", block("heal"), re.MULTILINE)
    for number, script in enumerate(scripts):
        job = tmp_path / f"job-{number}"
        subprocess.run(["git", "clone", "-q", str(tmp_path / "forge.git"), str(job)], check=True)
        if number:  # the artifact of the job before
            (tmp_path / "job-0" / "out").rename(job / "out")
        script = script if bwrap_works() else script.replace("--sandbox require", "")
        done = subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=job, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    report = json.loads((tmp_path / "job-1" / "out" / "report.json").read_text(encoding="utf-8"))
    assert Repository(tmp_path / "forge.git").tree("agent/self-heal") == report["tree"]
    assert "pr create --draft --head agent/self-heal --base main" in (tmp_path / "job-1" / "gh.txt").read_text()
    assert "test_double` fails without the change" in (tmp_path / "job-1" / "out" / "pr.md").read_text(encoding="utf-8")


def test_changelog_has_the_usual_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^(#+) (.+)$", text, re.MULTILINE)
    assert headings[0] == ("#", "Changelog") and headings[1][0] == "##"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for level, name in headings[1:]:
        assert (
            name in kinds
            if level == "###"
            else re.fullmatch(r"\[(Unreleased|\d+\.\d+\.\d+)\]( - \d{4}-\d\d-\d\d)?", name)
        )


def inline_metadata(text: str) -> str:
    """The `script` block of inline script metadata, as its specification reads it."""
    found = re.findall(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    assert [name for name, *_ in found] == ["script"]
    lines = found[0][1].splitlines()
    return "".join(line[2:] + "\n" if line.startswith("# ") else line[1:] + "\n" for line in lines)


def test_inline_metadata_brings_what_the_gate_needs() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = tomllib.loads(inline_metadata(PROGRAM.read_text(encoding="utf-8")))
    assert found == {
        "requires-python": project["requires-python"],
        "dependencies": project["optional-dependencies"]["gate"],
    }


def test_package_is_the_one_module_with_its_command() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = settings["project"]
    assert settings["tool"]["setuptools"]["py-modules"] == ["agent_runner"]
    assert project["dependencies"] == [] and project["scripts"] == {"agent-runner": "agent_runner:cli"}
    assert (ROOT / project["readme"]).is_file() and (ROOT / project["license-files"][0]).is_file()


def test_the_one_file_passes_a_gate_that_lints_it_by_defaults() -> None:
    done = subprocess.run(["ruff", "check", "--isolated", "-q", str(PROGRAM)], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode()


def test_command_exits_with_the_status(repo: Repository) -> None:
    code = "import sys; from agent_runner import cli; sys.argv[0] = 'agent-runner'; raise SystemExit(cli())"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, "self-heal", "--nope"], cwd=repo.path, env=env, capture_output=True
    )
    assert done.returncode == 3 and b"--nope" in done.stdout


def how_to_build() -> list[str] | None:
    """pip's options for a build from what is installed, or in CI from what it fetches; None where neither will do."""
    try:
        if int(metadata.version("setuptools").split(".")[0]) >= 77:
            return ["--no-index", "--no-build-isolation"]
    except metadata.PackageNotFoundError:
        pass
    return [] if os.environ.get("CI") else None


@pytest.mark.skipif(how_to_build() is None, reason="setuptools 77 or later is not installed, and this is not CI")
def test_wheel_holds_the_one_module_and_nothing_of_the_tests(tmp_path: Path) -> None:
    made = fresh_clone(tmp_path)
    for name in ("README.md", "LICENSE"):
        made.write(name, (ROOT / name).read_text(encoding="utf-8"))
    made.write("tests/test_x.py", "")
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *(how_to_build() or [])]
    subprocess.run([*words, "-w", str(tmp_path), str(made.path)], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("agent_runner-*.whl"))) as wheel:
        names = wheel.namelist()
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert [name for name in names if ".dist-info/" not in name] == ["agent_runner.py"]
        assert b"agent-runner = agent_runner:cli" in wheel.read(entry)
