"""Make an environment for each peer, so that none has to agree with another's pins.

    python -m benchmarks.peers.environment FOLDER [--only tiatoolbox] [--python PYTHON]

TIAToolbox 2.1.3 asks for ``torch<2.13``; it is installed beside the torch that this package's
tests run with, so that all tools compute with the same kernels. What else it requires is
installed as it says, less what only its notebooks and documentation use.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "constraints-cpu.txt"
SHARED = ("psutil", "safetensors", "opencv-python-headless", "openslide-python", "openslide-bin")
PACKAGES = {
    "tiatoolbox": ("torchvision==0.28.0", "tiatoolbox==2.1.3"),
    "original": ("joblib", "numpy", "scikit-image", "scipy", "shapely", "zarr>=3.1.3"),
}
"""Environments by name: TIAToolbox's is installed past its pins, the other with its own."""
NOT_NEEDED = {"torch", "torchvision", "jupyterlab", "ipywidgets", "sphinx"}
"""What TIAToolbox requires and does not import here."""
REQUIRES = "from importlib.metadata import requires; print('\\n'.join(requires('tiatoolbox')))"
CAN_LOAD = (
    "import sqlite3; sqlite3.connect(':memory:').enable_load_extension(True); import ensurepip"
)


def interpreter(folder: Path, name: str) -> Path:
    """Return the Python of an environment, made or not."""
    return folder / name / "bin" / "python"


def wanted(requirements: Sequence[str]) -> list[str]:
    """Return the requirements that are needed: no extras, nothing for notebooks.

    Args:
        requirements: as a package's metadata states them.
    """
    names = [(re.split(r"[^\w.-]", line, maxsplit=1)[0].lower(), line) for line in requirements]
    return [line for name, line in names if "extra ==" not in line and name not in NOT_NEEDED]


def make(folder: Path, name: str, python: str) -> None:
    """Make an environment, or complete one that is there.

    Raises:
        SystemExit: the Python cannot do what the environment needs.
    """
    if subprocess.run([python, "-c", CAN_LOAD], capture_output=True).returncode:
        raise SystemExit(
            f"{python} cannot make the environment {name!r}: its sqlite3 must load extensions "
            "(TIAToolbox stores its objects so) and it must have venv. "
            "Name another one with --python, as a rule the system's."
        )
    subprocess.run([python, "-m", "venv", folder / name], check=True)
    own = interpreter(folder, name)
    pip = [own, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", PINS]
    subprocess.run([*pip, "torch", *SHARED], check=True)
    if name == "tiatoolbox":
        subprocess.run([*pip, "--no-deps", *PACKAGES[name]], check=True)
        listed = subprocess.run([own, "-c", REQUIRES], check=True, capture_output=True, text=True)
        subprocess.run([*pip, *wanted(listed.stdout.splitlines())], check=True)
    else:
        subprocess.run([*pip, *PACKAGES[name]], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="gets one environment a peer")
    parser.add_argument("--only", nargs="+", choices=sorted(PACKAGES), default=sorted(PACKAGES))
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    for name in args.only:
        make(args.folder, name, args.python)
        print(f"{name}: {interpreter(args.folder, name)}")


if __name__ == "__main__":
    main()
