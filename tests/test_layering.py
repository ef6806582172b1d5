"""The house: imports run downward, calls leave torch's settings alone, the public names are the contract's."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tdpo_kernels
from tdpo_kernels import fused_tdpo_loss, token_stats
from tdpo_kernels.backends import one_tile, products, slab

PACKAGE = Path(tdpo_kernels.__file__).parent
ORDER = [  # each layer imports from earlier ones only
    {"types", "collectives", "version"},
    {"reference", "pack", "loss"},
    {"checks", "device", "tuning"},
    {"backends.tile_math", "backends.products"},
    {"backends.slab"},
    {"backends.dlogits", "backends.launch", "backends.sums"},
    {"backends.selfcheck"},
    {"backends.kernel_walk"},
    {"backends.rowwise", "backends.one_tile"},
    {"backends.naive", "backends.tiled", "backends.fused"},
    {"backends.regroup"},
    {"backends.sharded"},
    {"backends"},
    {"call"},
    {"registered"},
    {"op"},
    {"api"},
    {"parallel"},
    {""},
    {"verify"},
    {"__main__"},
]
HOUSES = ("device", "backends.selfcheck", "parallel")  # of one layer, whose files may import each other
PUBLIC = ["LMHead", "TDPOLoss", "TDPOOutput", "TokenStats", "fused_tdpo_loss", "token_stats"]
ALLOWED = {"torch", "triton"} | set(sys.stdlib_module_names)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> int:
    while module:
        for height, names in enumerate(ORDER):
            if module in names:
                return height
        module = module.rpartition(".")[0]
        assert module.startswith(HOUSES), "this module has no place in ORDER: give it one"
    return next(i for i, names in enumerate(ORDER) if "" in names)


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
    if not node.level:
        return node.module or ""
    parts = ["tdpo_kernels", *module.split(".")] if module else ["tdpo_kernels"]
    up = node.level - (MODULES[module].name == "__init__.py")
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_strictly_downward(module: str):
    own, _ = imports(module)
    upward = [name for name in own if layer(name) >= layer(module)]
    within = [name for name in upward if module.startswith(HOUSES) and layer(name) == layer(module)]
    assert set(upward) <= set(within), f"{module or '__init__'} imports {upward} from its own layer or above"


@pytest.mark.parametrize("module", MODULES)
def test_only_torch_and_the_standard_library_are_imported(module: str):
    _, foreign = imports(module)
    assert foreign <= ALLOWED, f"{module or '__init__'} imports {sorted(foreign - ALLOWED)}"
    assert "triton" not in foreign or module.startswith(("device", "backends.launch", "backends.selfcheck"))
    assert "torch" not in foreign or not module.startswith("device."), "device code is triton only"


def test_the_parser_sees_what_it_should():
    """Two known edges: otherwise the tests above would pass on nothing."""
    assert imports("op")[0] >= {"checks", "backends", "pack", "types"}
    assert imports("backends.tiled")[0] >= {"types", "backends.sums", "backends.slab", "backends.dlogits"}


def test_kernel_knows_no_preferences_and_loss_no_vocabulary():
    words = ("chosen", "rejected", "beta", "tdpo1", "tdpo2", "preference")
    for name in (m for m in MODULES if m.startswith("backends")):
        names = {n.id for n in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(n, ast.Name)}
        assert not names & set(words), name
    assert not imports("loss")[0] - {"types"}


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


def batch(dtype: torch.dtype) -> dict:
    gen = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=gen).to(dtype) for shape in ((2, 5, 8), (11, 8), (2, 5, 8), (11, 8))]
    tensors[0].requires_grad_(), tensors[1].requires_grad_()
    labels = torch.randint(0, 11, (2, 5), generator=gen)
    return dict(zip(["hidden", "head", "ref_hidden", "ref_head", "labels"], [*tensors, labels], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("budget", [0, 2**30])
def test_calls_leave_torch_alone(dtype: torch.dtype, budget: int):
    before = settings()
    fused_tdpo_loss(**batch(dtype), memory_budget=budget).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        fused_tdpo_loss(**batch(torch.float32), memory_budget=budget).loss.backward()
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
def test_product_precision_is_the_user_s_before_during_and_after(
    setting: str, dtype: torch.dtype, precision, monkeypatch
):
    precision.fp32_precision = setting
    shown, during = precision.fp32_precision, []

    def seeing(make):
        return lambda *args, **named: (during.append(precision.fp32_precision), make(*args, **named))[1]

    for module, name in (
        (slab, "logits_"),
        (products, "accumulate_"),
        (one_tile, "logits_"),
        (one_tile, "accumulate_"),
    ):
        monkeypatch.setattr(module, name, seeing(getattr(module, name)))
    fused_tdpo_loss(**batch(dtype), memory_budget=0).loss.backward()
    assert len(during) > 2 and set(during) == {shown} == {precision.fp32_precision}


def test_public_names_are_the_contract_s():
    assert sorted(tdpo_kernels.__all__) == PUBLIC
    assert all(hasattr(tdpo_kernels, name) for name in PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str):
    thing = getattr(tdpo_kernels, name)
    doc = inspect.getdoc(thing)
    assert doc and len(doc.split()) > 8
    assert "dataclass" not in doc and not doc.startswith(f"{name}("), (
        "that is the dataclass's own signature, not a docstring"
    )


@pytest.mark.parametrize("function", [fused_tdpo_loss, token_stats])
def test_every_argument_is_documented(function):
    doc = inspect.getdoc(function) + inspect.getdoc(token_stats)
    missing = [name for name in inspect.signature(function).parameters if name not in doc]
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module: str):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))
