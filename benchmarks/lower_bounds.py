"""The tests under the lowest versions of the dependencies that setup.cfg allows, on top of the present environment.

torch stays as it is installed, as its wheels are large.
"""

import configparser
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .measure import make_parser

ROOT = Path(__file__).parents[1]
KEPT = ("torch",)
WITH_DEPENDENCIES = ("huggingface_hub",)  # those of the lowest version are others
TESTS = ("peft", "foreign_adapters", "saving", "train", "from_autoregressive", "trainer", "loading", "eval_gsm8k")
TESTS += ("resuming", "generation", "configuration", "remote_code")


def lower_bounds() -> dict[str, str]:
    """Return the lowest version of each dependency of setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options"]["install_requires"].split()
    return dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in lines)


def install(bounds: dict[str, str], folder: str) -> None:
    """Install the lowest versions into a folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", folder]
    wanted = {name: f"{name}=={version}" for name, version in bounds.items() if name not in KEPT}
    subprocess.run([*pip, *(wanted.pop(name) for name in WITH_DEPENDENCIES)], check=True)
    subprocess.run([*pip, "--no-deps", *wanted.values()], check=True)


def main() -> None:
    """Install, run the tests, and exit as they do."""
    make_parser("lower_bounds", __doc__).parse_args()
    bounds = lower_bounds()
    with tempfile.TemporaryDirectory() as folder:
        install(bounds, folder)
        print(*(f"{name} {version}" for name, version in bounds.items() if name not in KEPT), sep=", ", flush=True)
        paths = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        tests = [f"tests/test_{name}.py" for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:warnings", *tests]
        sys.exit(subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}).returncode)


if __name__ == "__main__":
    main()
