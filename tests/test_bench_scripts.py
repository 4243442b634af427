"""Scripts of the benchmark suite: they explain themselves, and write nothing that nobody asked for."""

import ast
import contextlib
import importlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest
from fastebm.bench import breakdown, compilation, markdown, rows, tables
from fastebm.bench import pool as pools

ROOT = Path(__file__).parent.parent
MAIN = 'if __name__ == "__main__":\n'
SCRIPTS = [path.stem for path in sorted((ROOT / "bench").glob("*.py")) if MAIN in path.read_text(encoding="utf-8")]
COMMANDS = [[name] for name in SCRIPTS] + [["gpu", name] for name in ("visit", "rows", "launch")]
linux = pytest.mark.skipif(sys.platform != "linux", reason="triton and GPUs: Linux")


def committed():
    """What a script must not touch unless told to: {path: content}."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*"), *(ROOT / "bench" / "results").rglob("*")]
    return {path: path.read_bytes() for path in files if path.is_file()}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory of its own, and committed files that stay as they are."""
    before = committed()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert committed() == before


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def main_of(name):
    return importlib.import_module(f"fastebm.bench.{name}").main


@linux
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_script_explains_itself_and_refuses_what_it_does_not_know(command, elsewhere, capsys):
    """In this process: importing torch for every script would take a minute. The guard is compared as text."""
    name, *options = command
    assert (ROOT / "bench" / f"{name}.py").read_text(encoding="utf-8").endswith(f"\n\n{MAIN}    sys.exit(main())\n")
    with pytest.raises(SystemExit, match=r"^0$"):
        main_of(name)([*options, "--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: ")
    if "--out" in said and command != ["gpu"]:
        assert "(default: runs/" in " ".join(said.split())
    # and no abbreviations: --hel would print the help
    for unknown in ("--no-such-option", "--hel"):
        with pytest.raises(SystemExit, match=r"^2$"):
            main_of(name)([*options, unknown])
    assert not files(elsewhere)


@linux
@pytest.mark.parametrize("option", ["--help", "--no-such-option"])
def test_the_same_in_a_process_of_its_own(option, elsewhere):
    script = [sys.executable, str(ROOT / "bench" / "resources.py"), option]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == (0 if option == "--help" else 2)
    assert "usage: resources.py" in done.stdout + done.stderr
    assert not files(elsewhere)


@linux
@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("breakdown", ("steps", "pools", "first_calls")),
        ("precision", ("rows_of",)),
        ("recipes", ("run",)),
        ("resources", ("compile_rows",)),
        ("pool", ("race",)),
        ("sampling_parts", ("rows_of",)),
    ],
)
def test_rows_go_to_runs_unless_told(name, work, elsewhere, monkeypatch):
    module = importlib.import_module(f"fastebm.bench.{name}")
    about = {"n_chains": 3, "contestant": "", "steps": 2, "device": "cpu", "status": "missing", "note": "not here"}
    row = {"data": "moons", "seed": 0, "two_sample_accuracy": 0.5, "wall_seconds": 1.0, **about}
    for function in work:
        monkeypatch.setattr(module, function, lambda *_: row if name == "recipes" else [row])
    assert module.main([]) == 0
    assert module.main(["--out", "there"]) == 0
    assert module.main(["--out", "there"]) == 0  # the same rows again
    assert files(elsewhere) == {f"runs/bench/{name}.csv", f"there/{name}.csv"}
    assert rows.read(elsewhere / "there" / f"{name}.csv") == rows.read(elsewhere / "runs" / "bench" / f"{name}.csv")


@pytest.mark.parametrize(
    ("module", "work", "result", "ask", "asked"),
    [
        (
            *(breakdown, "parts_of_a_first_call", {"whole": 2.0}),
            *(lambda: breakdown.first_calls("compile-table", 1), ("compile-table",)),
        ),
        (
            *(compilation, "first_calls", {"first": 9.0, "later": 1.0}),
            lambda: list(compilation.measure("compile-table", [("eager", "float32")], "cpu", 1)),
            ("compile-table", "eager", "float32", "cpu", 1),
        ),
        (
            *(pools, "measure_memory", {"peak_bytes": 1}),
            *(lambda: pools.memory("fastebm", 600, 2, "cpu"), ("fastebm", 600, 2, "cpu")),
        ),
    ],
    ids=["breakdown", "compilation", "pool"],
)
def test_a_script_understands_what_it_asks_of_a_second_process(module, work, result, ask, asked, monkeypatch):
    seen = []

    def here(command, **options):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = module.main(command[3:])
        return subprocess.CompletedProcess(command, status, out.getvalue(), "")

    monkeypatch.setattr(module, work, lambda *arguments: seen.append(arguments) or result)
    monkeypatch.setattr(module.subprocess, "run", here)
    assert ask()
    assert set(seen) == {asked}


def test_tables_are_written_only_when_asked(elsewhere, monkeypatch, capsys):
    for file in {file for file, _, _ in tables.TABLES}:
        (elsewhere / file).parent.mkdir(exist_ok=True)
        (elsewhere / file).write_bytes((ROOT / file).read_bytes())
    for path in (ROOT / "docs").glob("*.png"):  # the tables show the figures that are there
        (elsewhere / "docs" / path.name).touch()
    monkeypatch.setattr(markdown, "ROOT", elsewhere)
    readme = elsewhere / "README.md"
    right = readme.read_text(encoding="utf-8")
    wrong = right.replace("<!-- digits -->\n", "<!-- digits -->\nstale\n")
    readme.write_text(wrong, encoding="utf-8")
    assert tables.main(["--check"]) == 1
    assert "README.md: digits" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^2$"):
        tables.main([])
    assert readme.read_text(encoding="utf-8") == wrong
    assert tables.main(["--write"]) == 0
    assert readme.read_text(encoding="utf-8") == right
    assert tables.main(["--check"]) == 0


def test_a_contestant_that_there_is_not_is_told(capsys):
    for name, precision in (("nobody", "float32"), ("eager", "bf16")):
        with pytest.raises(SystemExit, match=r"^2$"):
            compilation.main(["compile-table", name, precision, "cpu", "1"])
        said = capsys.readouterr().err
        assert f"no contestant is called '{name} {precision}'; there are eager float32, fastebm float32" in said


def imported_by(name):
    """Modules of bench/ that one imports, itself and lazy imports included."""
    found, todo = set(), [name]
    while todo:
        found.add(module := todo.pop())
        for node in ast.walk(ast.parse((ROOT / "bench" / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastebm.bench"):
                inner = node.module.split(".")[2:] or [alias.name for alias in node.names]
                todo += [part for part in inner if part not in found]
    return found


def test_the_command_of_an_installed_package_needs_no_tests():
    needed = imported_by("run")
    assert {"race", "contestants", "training", "compilation"} <= needed
    assert not needed & {"resources", "gpu_tests", "micro"}  # they run tests/, or need pytest
    for name in needed:
        text = (ROOT / "bench" / f"{name}.py").read_text(encoding="utf-8")
        assert '"tests' not in text
        assert "import pytest" not in text
