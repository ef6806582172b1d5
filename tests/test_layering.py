"""The house: imports run downward, calls leave torch's settings alone, the public names are the contract's."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest
import torch
from batches import batch
from seeing import Seeing

import tdpo_kernels
from tdpo_kernels import fused_tdpo_loss, token_stats

PACKAGE = Path(tdpo_kernels.__file__).parent
PUBLIC = ["LMHead", "TDPOLoss", "TDPOOutput", "TokenStats", "fused_tdpo_loss", "token_stats"]
ALLOWED = {"torch", "triton"} | set(sys.stdlib_module_names)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> tuple[set[str], set[str]]:
    """The package's own modules that `module` imports, and the top-level names of everything else."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            inside = name.removeprefix("tdpo_kernels.")
            if name.split(".")[0] != "tdpo_kernels":
                foreign.add(name.split(".")[0])
            else:
                own.add(inside if inside in MODULES else inside.rpartition(".")[0])
    return own, foreign


def _absolute(module: str, node: ast.ImportFrom) -> str:
    name = f"{PACKAGE.name}.{module}".rstrip(".")
    package = name if MODULES[module].name == "__init__.py" else name.rpartition(".")[0]
    return resolve_name("." * node.level + (node.module or ""), package)


def test_imports_run_strictly_downward():
    """No module imports one that imports it, by whatever way: each can be read knowing those below only."""
    below = {module: imports(module)[0] & set(MODULES) for module in MODULES}
    while below:
        lowest = [module for module, names in below.items() if not names & set(below)]
        assert lowest, f"these import one another: { {m: sorted(x & set(below)) for m, x in below.items()} }"
        below = {module: names for module, names in below.items() if module not in lowest}


SEAMS = {
    "loss": {"types"},
    "reference": {"types"},
    "pack": {"types", "checks"},
    "device": {"device"},
    "backends": {"backends", "types", "reference", "checks", "tuning", "device", "selfcheck", "collectives", "version"},
}


@pytest.mark.parametrize("house", SEAMS)
def test_backends_know_no_preferences_and_the_loss_no_vocabulary(house: str):
    for module in (m for m in MODULES if m.split(".")[0] == house):
        strangers = {name for name in imports(module)[0] if name.split(".")[0] not in SEAMS[house]}
        assert not strangers, f"{module} imports {sorted(strangers)}"


@pytest.mark.parametrize("module", MODULES)
def test_only_torch_and_the_standard_library_are_imported(module: str):
    _, foreign = imports(module)
    assert foreign <= ALLOWED, f"{module or '__init__'} imports {sorted(foreign - ALLOWED)}"
    kernels = ("device", "backends.launch", "backends.selfcheck", "selfcheck", "offline", "kernels")
    assert "triton" not in foreign or module.startswith(kernels)
    assert "torch" not in foreign or not module.startswith("device."), "device code is triton only"


def test_the_parser_sees_what_it_should():
    """Two known edges: otherwise the tests above would pass on nothing."""
    assert imports("op")[0] >= {"checks", "backends", "types"}
    assert imports("api")[0] >= {"checks", "loss", "op", "types"}


def test_backends_speak_of_rows_only():
    words = {"chosen", "rejected", "beta", "tdpo1", "tdpo2", "preference"}
    for name in (m for m in MODULES if m.startswith(("backends", "device"))):
        used = {n.id for n in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(n, ast.Name)}
        assert not words & used, name


STATE = """
import json, random, sys, torch
def state():
    matmul = torch.backends.mkldnn.matmul
    return [
        str(torch.get_default_dtype()), torch.get_num_threads(), torch.get_num_interop_threads(), matmul.fp32_precision,
        torch.backends.fp32_precision, torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32,
        torch.get_rng_state().sum().item(), hash(random.getstate()), str(torch.get_default_device()),
        torch.is_anomaly_enabled(),
    ]
before, modules = state(), set(sys.modules)
import tdpo_kernels
new = {name.split(".")[0] for name in set(sys.modules) - modules}
print(json.dumps([before == state(), sorted(new)]))
"""


def test_import_is_light_and_leaves_torch_alone():
    done = subprocess.run([sys.executable, "-c", STATE], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    untouched, new = json.loads(done.stdout)
    assert untouched
    assert "tdpo_kernels" in new
    assert not set(new) & {"triton", "transformers", "numpy", "trl", "datasets", "accelerate", "pandas"}


def settings() -> list:
    namespace: dict = {}
    exec(STATE.partition("before, modules")[0], namespace)
    return namespace["state"]()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("budget", [0, 2**30])
def test_calls_leave_torch_alone(dtype: torch.dtype, budget: int):
    before = settings()
    fused_tdpo_loss(**batch(dtype, 2), memory_budget=budget).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        fused_tdpo_loss(**batch(torch.float32, 2), memory_budget=budget).loss.backward()
    assert settings() == before


@pytest.fixture
def precision():
    """oneDNN's process-wide switch, put back whatever a test does to it."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        pytest.skip("this torch has no torch.backends.mkldnn.matmul")
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("setting", ["none", "ieee", "bf16"])
def test_product_precision_is_the_user_s_before_during_and_after(setting: str, dtype: torch.dtype, precision):
    precision.fp32_precision = setting
    shown, during = precision.fp32_precision, []

    class Precisions(Seeing):
        def note(self, func, args, results) -> None:
            during.append(precision.fp32_precision)

    with Precisions():
        fused_tdpo_loss(**batch(dtype, 2), memory_budget=0).loss.backward()
    assert len(during) > 10 and set(during) == {shown} == {precision.fp32_precision}


def test_public_names_are_the_contract_s():
    assert sorted(tdpo_kernels.__all__) == PUBLIC
    assert all(hasattr(tdpo_kernels, name) for name in PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str):
    thing = getattr(tdpo_kernels, name)
    doc = inspect.getdoc(thing)
    assert doc and len(doc.split()) > 8
    assert "dataclass" not in doc and not doc.startswith(f"{name}("), "that is a dataclass's signature, no docstring"


@pytest.mark.parametrize("function", [fused_tdpo_loss, token_stats])
def test_every_argument_is_documented(function):
    doc = inspect.getdoc(function) + inspect.getdoc(token_stats)
    missing = [name for name in inspect.signature(function).parameters if name not in doc]
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module: str):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))
