"""Who may import whom: no cycle of modules, no import up a floor, and every name from the module
that defines it.
"""

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from import_graph import (
    FLOORS,
    Import,
    borrowed,
    cycle,
    graph,
    imports,
    library,
    module_name,
    modules,
    name_of,
    source_of,
)

# What a floor may import beside the standard library: at the head of a module, and only inside
# functions.
HEAVY = {"torch", "numpy", "lightning", "safetensors", "PIL", "fsspec", "tqdm"}
EXTRAS = {"accelerate", "datasets", "tensorboard", "matplotlib", "jsonargparse", "peft"}
EAGER = {
    "noising": {"torch", "numpy"},
    "sampling": {"torch", "numpy"},
    "training": HEAVY,
    "callbacks": HEAVY,
}
LAZY = {
    "noising": {"scipy", "diffusers", "huggingface_hub", "ot"},
    "sampling": {"diffusers", "torchsde"},
    "training": {"diffusers"} | EXTRAS,
    "callbacks": {"diffusers"} | EXTRAS,
}
DIFFUSERS_MODULES = (
    "*/*diffusers*.py",
    "sampling/interop/*.py",
    "sampling/schedulers/*.py",
    "training/networks.py",
    "training/checkpoints/loading.py",
    "training/flags/base_model.py",
)


# Modules that subclass what they may not import at the head; others import them inside functions only.
LATER = {
    "sampling/interop/scheduler.py": {"diffusers"},
    "noising/utils/compiled.py": {"numba"},
    "noising/utils/triton_kernels.py": {"triton"},
    "sampling/schedulers/drop_in.py": {"diffusers"},
}
# Packages that no extra installs, inside functions: who asks for an mp4, or hands over a tracker, has them.
OF_THE_USER = {"training/media/videos.py": {"imageio"}, "training/publishing/loggers.py": {"wandb"}}


def offence(path: str, item: Import) -> str | None:
    """What is wrong with an import in a packaged module, or None."""
    folder, top = path.split("/")[0], item.module.split(".")[0] or str(item.name)
    if item.relative:
        below = FLOORS[: FLOORS.index(folder) + 1]
        return (
            None
            if top in below
            else f"{folder} may import only itself and the floors below it: {below}"
        )
    if top in sys.stdlib_module_names:
        return None
    if top in {"alphabar", *FLOORS}:
        return "inside the packages, imports of siblings are relative"
    if top == "diffusers" and not any(fnmatch(path, pattern) for pattern in DIFFUSERS_MODULES):
        return f"diffusers is for these modules alone: {DIFFUSERS_MODULES}"
    allowed = EAGER[folder] | LATER.get(path, set())
    if top in allowed or (item.lazy and top in LAZY[folder] | OF_THE_USER.get(path, set())):
        return None
    return (
        f"{folder} may import {sorted(EAGER[folder])}, and inside functions {sorted(LAZY[folder])}"
    )


@pytest.mark.parametrize("module", library())
def test_imports_are_allowed(module: str) -> None:
    path, text = library()[module]
    found = [(item, offence(path, item)) for item in imports(path, text)]
    assert not [f"{path}:{item.line}: {item.module}: {words}" for item, words in found if words]


@pytest.mark.parametrize("path", LATER)
def test_what_is_imported_later_is_imported_inside_functions(path: str) -> None:
    own = module_name(path)
    known = library()
    eager = [
        f"{file}:{item.line}"
        for file, text in known.values()
        for item in imports(file, text)
        if source_of(item, known) == own and not item.lazy and file not in LATER
    ]
    assert eager == []


def test_there_is_no_cycle() -> None:
    assert cycle(graph()) == []


def test_names_come_from_the_module_that_defines_them() -> None:
    assert borrowed() == []


OFFENCES = [
    ("noising/a.py", "import PIL"),
    ("noising/a.py", "def f():\n    from diffusers import UNet2DModel"),
    ("noising/a.py", "from ..sampling import Sampler"),
    ("noising/a.py", "from .. import sampling"),
    ("noising/curves/a.py", "from ...sampling import Sampler"),
    ("sampling/a.py", "from alphabar.noising import NoiseSchedule"),
    ("sampling/a.py", "from noising import NoiseSchedule"),
    ("sampling/a.py", "import lightning"),
    ("sampling/interop/a.py", "import diffusers"),
    ("sampling/a.py", "def f():\n    import diffusers"),
    (
        "sampling/a.py",
        "def f():\n    import importlib\n    importlib.import_module('diffusers.schedulers')",
    ),
    ("sampling/a.py", "from ...alphabar import noising"),
    ("training/a.py", "from ..callbacks import ValidationSampling"),
    ("training/cli/a.py", "if TYPE_CHECKING:\n    from ...callbacks import ValidationSampling"),
    ("training/a.py", "try:\n    import datasets\nexcept ImportError:\n    datasets = None"),
    ("training/a.py", "import pytorch_lightning"),
]
ALLOWED = [
    (
        "noising/a.py",
        "import math\nimport torch.nn.functional as F\nfrom . import curves\nfrom .curves import "
        "Flow",
    ),
    (
        "sampling/a.py",
        "from ..noising.schedule import NoiseSchedule\nfrom .. import noising\nimport numpy as np",
    ),
    ("sampling/interop/a.py", "def f():\n    from diffusers import DDIMScheduler"),
    ("sampling/diffusers_config.py", "if TYPE_CHECKING:\n    from diffusers import DDIMScheduler"),
    (
        "training/cli/a.py",
        "from lightning import LightningModule\nfrom ...sampling import Sampler\nfrom ..module "
        "import M",
    ),
    (
        "callbacks/a.py",
        "from ..training import DiffusionModule\ndef f():\n    import matplotlib.pyplot",
    ),
]


@pytest.mark.parametrize(
    ("path", "text", "right"), [(*c, False) for c in OFFENCES] + [(*c, True) for c in ALLOWED]
)
def test_what_is_allowed(path: str, text: str, right: bool) -> None:
    assert all(offence(path, item) is None for item in imports(path, text)) is right


def tree(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "back",
    [
        "from .a import f",
        "def g():\n    from .a import f",
        "if TYPE_CHECKING:\n    from . import a",
    ],
)
def test_a_cycle_is_seen(tmp_path: Path, back: str) -> None:
    root = tree(
        tmp_path,
        noising__a="from .b import g\ndef f(): ...",
        noising__b=back,
        noising__c="from .a import f",
    )
    assert set(cycle(graph(root))) == {"noising.a", "noising.b"}
    assert cycle({"noising.a": {"noising.b"}, "noising.b": set()}) == []


def test_a_borrowed_name_is_seen(tmp_path: Path) -> None:
    files = {
        "noising__a": "def f(): ...\nG: int = 1",
        "noising__b": "from .a import f, G",
        "noising__c": "from .b import f",
    }
    assert borrowed(tree(tmp_path, **files)) == ["noising/c.py:1: noising.b.f"]


@pytest.mark.parametrize("path", modules("tests", "examples", "benchmarks"), ids=name_of)
def test_tests_and_examples_import_the_installed_package(path: Path) -> None:
    found = imports(name_of(path), path.read_text(encoding="utf-8"))
    bare = [
        f"{name_of(path)}:{item.line}: {item.module}"
        for item in found
        if item.module.split(".")[0] in FLOORS
    ]
    assert not bare, "a second copy of every class: import alphabar.<folder>"


def test_importing_alphabar_loads_nothing_heavy() -> None:
    """What the static guard cannot see: a function that is called while a module is imported."""
    code = """
import sys, torch
before = set(sys.modules)
import alphabar.noising
own = {name for name in set(sys.modules) - before if name.startswith("alphabar")}
assert set(sys.modules) - before == own and len(own) < 50, set(sys.modules) - before
assert not [name for name in own if not name.startswith("alphabar.noising") and "." in name]
import alphabar.sampling
assert not {"lightning", "diffusers"} & sys.modules.keys()
import alphabar.training
from alphabar.training import Previews
assert not {"lightning", "diffusers"} & sys.modules.keys()
import alphabar.callbacks
assert not {"diffusers", "datasets", "accelerate"} & sys.modules.keys()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
