"""The machine and the software that a result came from, without names that identify the machine or its owner."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerators() -> int:
    """NVIDIA GPUs that this process may use, found without loading CUDA (workers are forked from a process without it)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    found = Path("/proc/driver/nvidia/gpus")
    if found.is_dir():
        return len(list(found.iterdir()))
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) if Path("/dev").is_dir() else 0


def resolve_device(device: str) -> str:
    """`auto` -> `cuda` where there is an NVIDIA GPU, else `cpu`; anything else is returned as given."""
    if device != "auto":
        return device
    return "cuda" if accelerators() else "cpu"


def describe_hardware() -> dict[str, object]:
    """Processor, cores, memory in GiB, accelerators, system."""
    import psutil

    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerators": _accelerator_names(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("trialist", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _accelerator_names() -> list[str]:
    folder = Path("/proc/driver/nvidia/gpus")
    names = []
    for gpu in sorted(folder.glob("*/information")) if folder.is_dir() else []:
        for line in gpu.read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                names.append(line.partition(":")[2].strip())
    return names
