"""What a run is made by: versions of libraries, revision of the code, and device."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("clbench", "torch", "torchvision", "timm", "numpy", "opencv-python", "hydra-core")


def made_by(device: torch.device) -> dict[str, Any]:
    """Versions, git revision and device, for config.yaml: name -> text; None where there is none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "python": platform.python_version(),
        **{library: _version(library) for library in _LIBRARIES},
        "git_revision": _git_revision(),
        "device": f"{device} ({name})",
    }


def _version(library: str) -> str | None:
    """The version of a library; None where it is installed under another name, as opencv-python-headless is."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the code that runs, with `-dirty` where files differ from it; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
