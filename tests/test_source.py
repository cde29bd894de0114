"""What a reader of the file may rely on: its imports, its two doors to processes, no merge and no push."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from conftest import PROGRAM

TREE = ast.parse(PROGRAM.read_text(encoding="utf-8"))
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
STARTS_PROCESS = {
    "subprocess": {"Popen", "run", "call", "check_call", "check_output", "getoutput", "getstatusoutput"},
    "os": {"system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "startfile"},
    "pty": {"spawn", "fork"},
    "multiprocessing": {"Process", "Pool"},
}
PRINTED = "proposal_commands"  # what the person would run


def function(name: str) -> ast.FunctionDef:
    (found,) = [node for node in TREE.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return found


def outside(*names: str) -> Iterator[ast.AST]:
    """Every node of the file that does not lie in one of these functions or classes."""
    todo: list[ast.AST] = [TREE]
    while todo:
        node = todo.pop()
        if not (isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names):
            yield node
            todo.extend(ast.iter_child_nodes(node))


def called_name(node: ast.AST) -> tuple[str, str]:
    """The module and the function of a call such as `os.fork()`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return node.func.value.id, node.func.attr
    return "", node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def starts_process(node: ast.AST) -> bool:
    module, name = called_name(node)
    return name in STARTS_PROCESS.get(module, ()) or (module == "os" and name.startswith(("exec", "spawn")))


def test_only_the_standard_library_is_imported() -> None:
    modules = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add((node.module or "").split(".")[0])
    assert modules <= sys.stdlib_module_names
    assert not modules & {"multiprocessing", "asyncio", "pty", "importlib"}


def test_processes_start_at_one_place_behind_two_doors() -> None:
    assert [node for node in outside("spawn", "Actor") if starts_process(node)] == []
    assert len([node for node in ast.walk(function("spawn")) if starts_process(node)]) == 1
    doors = {f.name for f in FUNCTIONS for node in ast.walk(f) if called_name(node) == ("", "spawn")}
    assert doors == {"call", "run_guarded"}
    imports = [node for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names}
    assert not names & {"Popen", "run", "system", "fork"}, "imported by name, a start could not be seen here"


def test_nothing_can_merge_or_push() -> None:
    """No text outside the simulated agent and the commands that are printed names such a command by itself."""
    words = {"merge", "push", "rebase", "cherry-pick", "am", "pull", "send-pack", "receive-pack", "request-pull"}
    texts = {node.value for node in outside("Actor", PRINTED) if isinstance(node, ast.Constant)}
    assert not words & texts


def git_calls(name: str) -> Iterator[tuple[ast.FunctionDef, ast.Call]]:
    """Each Git command in the user's own repository, and the function in which it stands."""
    for f in FUNCTIONS:
        for node in ast.walk(f):
            if isinstance(node, ast.Call) and called_name(node) == ("", name) and len(node.args) > 1:
                yield f, node


def test_users_repository_is_written_where_a_reader_expects_it() -> None:
    """Of all Git commands there only these change anything, each in the function that is named for it."""
    reads = {"for-each-ref", "ls-files", "ls-tree", "remote", "rev-list", "rev-parse", "status", "symbolic-ref", "var"}
    reads |= {"cat-file", "diff-tree"}
    writes: dict[str, set[str]] = {}
    for f, node in git_calls("git"):
        command, *rest = command_words(f, node)
        asks = command == "config" and str(rest[0]).startswith(("--get", "--list", "--type"))
        if command not in reads and not asks and (command, rest[:1]) != ("worktree", ["list"]):
            writes.setdefault(str(command), set()).add(f.name)
    assert writes == {"fetch": {"bring_commit"}, "update-ref": {"ensure_branch", "prune"}, "switch": {"switch_to"}}


def command_words(f: ast.FunctionDef, call: ast.Call) -> list[object]:
    """The words of a Git command, those included that stand in a tuple of the same function."""
    tuples = {
        node.targets[0].id: node.value.elts
        for node in ast.walk(f)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Tuple)
    }
    words: list[ast.expr] = []
    for arg in call.args[1:]:
        starred = arg.value.id if isinstance(arg, ast.Starred) and isinstance(arg.value, ast.Name) else None
        words += tuples.get(starred, [arg]) if starred else [arg]
    return [word.value if isinstance(word, ast.Constant) else None for word in words]


def test_assert_only_narrows_types() -> None:
    for node in ast.walk(TREE):
        if isinstance(node, ast.Assert):
            test = node.test
            narrows = isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot)
            assert narrows and node.msg is None, f"line {node.lineno}: {ast.unparse(node)}"


def test_import_has_no_effect(tmp_path: object) -> None:
    code = (
        "import os, signal, sys, threading\n"
        "before = dict(os.environ), os.getcwd(), signal.getsignal(signal.SIGINT), sorted(os.listdir())\n"
        "events = []\n"
        "sys.addaudithook(lambda name, args: events.append(name))\n"
        f"sys.path.insert(0, {str(PROGRAM.parent)!r}); sys.dont_write_bytecode = True\n"
        "import agent_runner\n"
        "after = dict(os.environ), os.getcwd(), signal.getsignal(signal.SIGINT), sorted(os.listdir())\n"
        "assert before == after and threading.active_count() == 1\n"
        "bad = ('subprocess.', 'os.system', 'os.fork', 'os.mkdir', 'os.remove', 'os.rename', 'socket.', 'shutil.')\n"
        "print([e for e in events if e.startswith(bad)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=str(tmp_path), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


NAMES = ["run_gate", "build_prompt", "find_config", "run_agent", "ensure_branch", "propose_pr", "reject"]


@pytest.mark.parametrize("name", NAMES)
def test_name_that_users_know_is_there(name: str) -> None:
    assert function(name)
