"""Build the sdist and the wheel, check them, and try them in empty environments.

    make release
    make release ARGS="--python 3.10 3.13"    # fails where one of these is not there

The files are built from what git tracks, so caches, runs and generated pages cannot be in them. For
each Python of the classifiers that is found (on PATH, in pyenv), the wheel is installed alone in a
new environment outside the checkout: every module is imported and the command is run. Then the
README's examples run there, with the extras that they name. The sdist is installed once.

torch is that of constraints.txt. Where pip finds only its build with CUDA (several GB), pip looks
for all dependencies, the code is compiled and ``alphabar --help`` run, without torch, and the
summary says so; ``--cuda`` takes that build.
``PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`` names the builds for the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with build

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

README_NEEDS = ["accelerate", "brownian", "matplotlib", "tensorboard"]
"""The extras that the README's examples use."""

IMPORTS = """
import importlib, pkgutil, sys
from importlib.metadata import version
import alphabar
from alphabar import noising, sampling, training, callbacks
assert version("alphabar") == sys.argv[1], version("alphabar")
count = 0
for module in pkgutil.walk_packages(alphabar.__path__, "alphabar."):
    try:
        found = importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "triton"):  # what compiles: imported where it is installed
            raise
    else:
        assert found.__file__.startswith(sys.prefix), found.__file__
        count += 1
for package in (noising, sampling, training, callbacks):
    for name in package.__all__:
        getattr(package, name)
print(count, "modules imported without extras")
"""


def run(*command: object, cwd: Path = ROOT, shown: bool = True, **environment: str) -> str:
    """Run a command and return what it prints; one that fails ends the release with its output."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=cwd,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if shown else subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:6])} ... failed:\n{done.stdout}{done.stderr or ''}")
    return done.stdout.strip()


def tracked() -> set[str]:
    """Return the files that are released: all that git tracks, but for dot files."""
    names = run("git", "ls-files", "-z").rstrip("\0").split("\0")
    return {name for name in names if not name.startswith(".")}


def build() -> tuple[Path, Path]:
    """Build the sdist from the tracked files, and the wheel from the sdist."""
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        for name in tracked():
            copy = source / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy)
        when = run("git", "log", "-1", "--format=%ct")
        options = {"PIP_CONSTRAINT": str(CONSTRAINTS), "SOURCE_DATE_EPOCH": when}
        run(sys.executable, "-m", "build", "--outdir", DIST, source, cwd=Path(folder), **options)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    return sdist, wheel


def check(sdist: Path, wheel: Path) -> None:
    """Check the metadata, the wheel's files, and that the sdist holds what git tracks."""
    print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel))
    print(run(sys.executable, "-m", "check_wheel_contents", wheel))
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    if names - made != tracked():
        raise SystemExit(f"sdist and git differ: {sorted((names - made) ^ tracked())}")
    print(f"{sdist.name}: the {len(tracked())} files that git tracks, {sdist.stat().st_size} bytes")
    print(f"{wheel.name}: {wheel.stat().st_size} bytes")


def check_tag(tag: str) -> None:
    """Raise SystemExit unless a tag is that of the version, and the changelog has its section."""
    version = PROJECT["version"]
    if tag != f"v{version}":
        raise SystemExit(f"the tag is {tag}, the version in pyproject.toml {version}")
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        raise SystemExit(f"CHANGELOG.md has no line '## [{version}] - YYYY-MM-DD'")


def versions() -> list[str]:
    """Return the Pythons that pyproject.toml names."""
    start = "Programming Language :: Python :: 3."
    return [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if c.startswith(start)]


def interpreter(version: str) -> Path | None:
    """Return a Python of a version: from PATH or pyenv."""

    def places() -> Iterator[Path]:
        if found := shutil.which(f"python{version}"):
            yield Path(found)
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
        yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"), reverse=True)

    for place in places():  # pyenv's shims are there for versions that are not
        done = subprocess.run([place, "-m", "venv", "--help"], capture_output=True)
        if done.returncode == 0:
            return place
    return None


class Environment:
    """An empty virtual environment of a Python; pip keeps to constraints.txt."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.folder = folder / "outside"
        self.folder.mkdir()
        run(python, "-m", "venv", folder / "venv")
        self.bin = folder / "venv" / "bin"

    def python(self, *words: object, cwd: Path | None = None) -> str:
        return run(self.bin / "python", *words, cwd=cwd or self.folder)

    def pip(self, *words: object) -> None:
        self.python("-m", "pip", "install", "--quiet", "-c", CONSTRAINTS, *words)

    def command(self, *words: object) -> str:
        return run(self.bin / "alphabar", *words, cwd=self.folder)

    def takes_cuda(self, *packages: object) -> bool:
        """Return whether pip would install CUDA too; what it does not find is an error."""
        words = ["-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *packages]
        report = run(self.bin / "python", *words, "-c", CONSTRAINTS, cwd=self.folder, shown=False)
        names = [item["metadata"]["name"].lower() for item in json.loads(report)["install"]]
        return any(name.startswith(("nvidia", "cuda")) for name in names)


def try_out(version: str, python: Path, sdist: Path | None, wheel: Path, cuda: bool) -> str:
    """Install and run the wheel, and the sdist if given, on a Python; return what was done."""
    torch = next(x for x in CONSTRAINTS.read_text("utf-8").split() if x.startswith("torch=="))
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(python, Path(folder))
        if not cuda and environment.takes_cuda(torch, wheel):
            environment.pip("--no-deps", wheel)
            (site,) = environment.bin.parent.glob("lib/python*/site-packages/alphabar")
            environment.python("-W", "error", "-m", "compileall", "-q", "-f", site)
            environment.command("--help")
            return (
                "all dependencies are found, the code compiles, alphabar --help runs; no more was "
                f"tried: pip finds no build of {torch} without CUDA"
            )
        environment.pip(torch)
        environment.pip(wheel)
        environment.python("-m", "pip", "check")
        print(f"Python {version}:", environment.python("-c", IMPORTS, PROJECT["version"]))
        environment.command("--help")
        listed = environment.command("samplers").splitlines()
        print(f"Python {version}: alphabar samplers lists {len(listed)} lines", flush=True)
        environment.pip(f"{wheel}[{','.join(README_NEEDS)}]", "pytest")
        tests = environment.folder / "tests"
        tests.mkdir()
        shutil.copy(ROOT / "tests" / "test_readme.py", tests)
        shutil.copy(ROOT / "README.md", environment.folder)
        passed = environment.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
        summary = f"wheel alone imported and run, README: {passed.splitlines()[-1]}"
        if sdist is not None:
            environment.pip("--no-deps", "--force-reinstall", sdist)
            environment.python("-c", IMPORTS, PROJECT["version"])
            summary += ", sdist installed and imported"
        return summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", help="these versions, each of which must be there")
    parser.add_argument("--cuda", action="store_true", help="take a build of torch with CUDA")
    parser.add_argument("--tag", help="fail unless this is the tag of the version and its changes")
    args = parser.parse_args(arguments)
    if args.tag is not None:
        check_tag(args.tag)
    begin = time.monotonic()
    sdist, wheel = build()
    check(sdist, wheel)
    print(f"built and checked in {time.monotonic() - begin:.0f} s", flush=True)
    lines, first, absent = [], True, []
    for version in args.python or versions():
        python, start = interpreter(version), time.monotonic()
        if python is None:
            absent.append(version)
            lines.append(f"Python {version}: not on this machine")
            continue
        done = try_out(version, python, sdist if first else None, wheel, args.cuda)
        first = first and "sdist" not in done
        lines.append(f"Python {version}: {done} ({time.monotonic() - start:.0f} s)")
        print(lines[-1], flush=True)
    print("", *lines, sep="\n")
    if "urls" not in PROJECT:
        print("before an upload: pyproject.toml names no [project.urls]")
    if absent and args.python:
        raise SystemExit(f"not found: Python {', '.join(absent)}")


if __name__ == "__main__":
    main()
