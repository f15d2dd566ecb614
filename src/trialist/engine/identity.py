"""What makes two runs the same run: inputs by content, arm, setting, seed, device, versions; and the source they ran with."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trialist.engine.contract import Arm, Trial


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; frozen dataclasses become objects. Raises ValueError for anything else."""

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return {"": type(item).__name__, **{f.name: plain(getattr(item, f.name)) for f in dataclasses.fields(item)}}
        if isinstance(item, Mapping):
            return {str(key): plain(entry) for key, entry in item.items()}
        if isinstance(item, (list, tuple)):
            return [plain(entry) for entry in item]
        if item is None or isinstance(item, (str, int, float, bool)):
            return item
        raise ValueError(f"options hold scalars or frozen dataclasses of scalars, not {type(item).__name__}: {item!r}")

    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any, size: int = 16) -> str:
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=size).hexdigest()


def inputs_of(trial: Trial) -> dict[str, Any]:
    """Field name -> value, as given."""
    return {field.name: getattr(trial, field.name) for field in dataclasses.fields(trial)}


def inputs_by_content(trial: Trial) -> dict[str, Any]:
    """Field name -> value, where a field names content (a file, a model) its digest instead."""
    inputs = inputs_of(trial)
    for name, content in trial.digests().items():
        if name not in inputs:
            raise ValueError(f"{type(trial).__name__}.digests() names {name!r}, which is no field of the trial")
        inputs[name] = content
    return inputs


def major_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Package -> `major.minor` (releases of that size change numbers), or `absent`."""
    found = {}
    for package in packages:
        try:
            found[package] = ".".join(importlib.metadata.version(package).split("+")[0].split(".")[:2])
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def run_identity(name: str, trial: Trial, inputs: Mapping[str, Any], arm: Arm, seed: int) -> str:
    """Hash of everything that decides what a run measures, the source apart. `inputs` come from `inputs_by_content`."""
    return digest(
        {
            "trial": name,
            "version": trial.version,
            "inputs": inputs,
            "arm": {"name": arm.name, "setting": arm.setting, "options": arm.options},
            "seed": seed,
            "versions": major_versions(trial.versions),
        }
    )


def source_digest(path: str, further: Sequence[str] = ()) -> str:
    """Hash of the source of `module:Class` and of every module of the same package that it imports, also inside functions.

    further: modules of the package that are imported by a name which no import statement shows (`Trial.sources`).

    Comments, docstrings and formatting do not count, nor does the engine: it runs the trial, it is not part of it.
    """
    module = path.partition(":")[0]
    top = module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise ValueError(f"cannot find the source of {path}: package {top!r} is not importable")
    origin = Path(spec.origin)
    root = origin.parent if origin.name == "__init__.py" else None
    seen: dict[str, str] = {}
    waiting = [module, *further]
    while waiting:
        current = waiting.pop()
        file = origin if root is None else _module_file(root, top, current)
        if current in seen or file is None:
            continue
        text = file.read_bytes()
        seen[current] = _code_digest(text)
        for imported in _imports(text, current, file.name == "__init__.py"):
            inside = imported == top or imported.startswith(top + ".")
            if inside and root is not None and not imported.startswith("trialist.engine"):
                waiting.extend(_defining_modules(root, top, imported))
    return digest(seen, size=8)


def _module_file(root: Path, top: str, module: str) -> Path | None:
    base = root.joinpath(*module.split(".")[1:]) if module != top else root
    for candidate in (base.with_suffix(".py") if module != top else base / "__init__.py", base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _defining_modules(root: Path, top: str, dotted: str) -> list[str]:
    """`package.module.Name` -> the modules that define it: re-exports of an `__init__` are followed to their file only."""
    if _module_file(root, top, dotted) is not None:
        return [dotted]
    parent, _, name = dotted.rpartition(".")
    if not parent:
        return []
    file = _module_file(root, top, parent)
    if file is None:
        return []
    if file.name == "__init__.py":
        for node in ast.walk(_parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
                return [parent if node.module is None else _absolute(node, parent, True)]
    return [parent]


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join(base + ([node.module] if node.module else []))


@functools.lru_cache(maxsize=4096)
def _parse(text: bytes) -> ast.Module:
    return ast.parse(text)


@functools.lru_cache(maxsize=4096)
def _imports(text: bytes, module: str, is_package: bool) -> tuple[str, ...]:
    found: list[str] = []
    for node in ast.walk(_parse(text)):
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            found.extend(f"{base}.{alias.name}" for alias in node.names)
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _code_digest(text: bytes) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # docstrings, also those that stand below a field
            node.body = [  # type: ignore[attr-defined]
                entry
                for entry in body
                if not (
                    isinstance(entry, ast.Expr)
                    and isinstance(entry.value, ast.Constant)
                    and isinstance(entry.value.value, str)
                )
            ]
    return hashlib.blake2b(ast.dump(tree).encode(), digest_size=8).hexdigest()
