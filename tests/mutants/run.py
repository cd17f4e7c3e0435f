"""Make one mistake at a time in a copy of the tree, and see whether the tests notice: ``make
mutants``.

    python tests/mutants/run.py                      # all of mutations.py
    python tests/mutants/run.py unipc guidance       # of files whose path has one of these words

The mistakes are the data of mutations.py: (old text, new text) in a file, with the tests that must
notice. A text that does not stand exactly once in its file is an error, as is a mistake whose tests
fail without it. A mistake that survives says that a test is missing, or that the mistake is none;
the exit code is then 1. Nothing is changed in place.

Each mistake runs in a fork of one process that has imported what the tests need and nothing of
alphabar, with ``pytest -x``.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parents[2]
PACKAGES = ("noising", "sampling", "training", "callbacks")
HEAVY = ("torch", "numpy", "scipy.stats", "hypothesis", "diffusers.schedulers", "lightning.pytorch")
LIMIT = 300  # seconds: a mistake may make the tests hang, which is noticed too


def copy_of_the_tree(folder: Path) -> Path:
    """Copy what git tracks or would add; ``folder/.import`` makes ``alphabar`` out of it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".import" / "alphabar").mkdir(parents=True)
    for package in PACKAGES:
        (folder / ".import" / "alphabar" / package).symlink_to(folder / package)
    return folder


def passes(tree: Path, tests: str) -> bool:
    """Run these pytest arguments on the tree, in a fork; what they print is in ``tree/.log``."""
    files, _, words = tests.partition(" -k ")
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *files.split()]
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 3
        try:
            signal.alarm(LIMIT)
            log = os.open(tree / ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(tree)
            sys.path.insert(0, str(tree / ".import"))
            os.environ["PYTHONPATH"] = str(tree / ".import")
            code = int(pytest.main(arguments + (["-k", words] if words else [])))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1, 2, -signal.SIGALRM):  # 2: a module that cannot be imported any more
        raise RuntimeError(
            f"pytest {tests} ended with {code}:\n{(tree / '.log').read_text()[-2000:]}"
        )
    return code == 0


def main(words: list[str]) -> int:
    sys.dont_write_bytecode = True  # a mistake may have the size and the second of what it replaces
    for name in HEAVY:
        importlib.import_module(name)
    counts = dict.fromkeys(("noticed", "survived", "error"), 0)
    sound: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_the_tree(Path(folder))
        for (file, tests), edits in MUTATIONS.items():
            if words and not any(word in file for word in words):
                continue
            source = (tree / file).read_text(encoding="utf-8")
            for old, new in edits:
                found = source.count(old)
                if tests not in sound:
                    sound[tests] = passes(tree, tests)
                if found != 1:
                    outcome, why = "error", f"the text stands {found} times: word it anew"
                elif not sound[tests]:
                    outcome, why = "error", f"pytest {tests} fails without it"
                else:
                    (tree / file).write_text(source.replace(old, new), encoding="utf-8")
                    outcome, why = (
                        ("survived", f"pytest {tests}") if passes(tree, tests) else ("noticed", "")
                    )
                    (tree / file).write_text(source, encoding="utf-8")
                counts[outcome] += 1
                print(f"{outcome:<8} {file}: {old!r} -> {new!r}  {why}".rstrip(), flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return int(counts["survived"] + counts["error"] > 0 or not counts["noticed"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
