"""The house rules: imports go down the list of rooms, heavy libraries stay unloaded until they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from trialist.engine.registry import trial_paths

SOURCE = Path(__file__).parents[1] / "src" / "trialist"
ROOMS = [
    "cli", "trials", "engine", "evaluation", "analysis", "search", "decoding", "training", "objectives", "optimizers",
    "weights", "models", "data", "kernels",
]  # fmt: skip
ENGINE_USERS = {"cli", "trials"}


def imported_rooms(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("trialist.")}
    return found & set(ROOMS)


@pytest.mark.parametrize("file", sorted(SOURCE.glob("*/**/*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_to_rooms_further_down_only(file):
    room = file.relative_to(SOURCE).parts[0]
    for other in imported_rooms(file) - {room}:
        assert ROOMS.index(other) > ROOMS.index(room), f"{room} imports {other}"
        assert room != "engine", f"the engine imports {other}"
        assert other != "engine" or room in ENGINE_USERS, f"{room} imports the engine"


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import trialist",
        "from trialist.cli.main import main; main(['--help'])",
        "from trialist.cli.main import main; main(['list'])",
        "from trialist.cli.main import main; main(['show', 'selective-attention'])",
        "from trialist.cli.main import main\ntry: main(['run', 'selective-attention', '--help'])\nexcept SystemExit: pass",
    ],
    ids=["import", "help", "list", "show", "run help"],
)
def test_looking_around_loads_no_heavy_library(code):
    assert not {"torch", "transformers", "sqlalchemy", "datasets", "scipy"} & modules_after(code)


def test_every_trial_imports_with_torch_blocked():
    code = "sys.modules['torch'] = None\nfrom trialist.engine.registry import *\n[load_trial(name) for name in trial_paths()]"
    assert "trialist.trials.selective_attention" in modules_after(code)


def test_every_trial_file_is_registered():
    registered = {path.partition(":")[0].rpartition(".")[2] for path in trial_paths().values()}
    files = {file.stem for file in (SOURCE / "trials").glob("*.py") if not file.stem.startswith("_")}
    assert files <= registered


def test_no_file_speaks_of_this_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=SOURCE.parents[1], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    home = str(SOURCE.parents[1])
    for name in tracked.stdout.split():
        file = SOURCE.parents[1] / name
        if file.is_file() and file.suffix in (".py", ".md", ".toml", ".json", ".txt", ".svg"):
            assert home + "/" not in file.read_text(errors="ignore"), name
