"""What autograd may ask: right gradients, none that nobody wants, and no product more than DESIGN's count."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tdpo_kernels import LMHead, fused_tdpo_loss, token_stats
from tdpo_kernels.backends import slab
from tdpo_kernels.pack import pack

BACKENDS = ("naive", "tiled")
EVERYTHING = 2**40
backends = pytest.mark.parametrize("backend", BACKENDS)
budgets = pytest.mark.parametrize("budget", [0, 1200, EVERYTHING])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    """Tiles of 3 x 16: several of them, and a short last one, in a few rows and columns."""
    monkeypatch.setitem(slab.TILE, "cpu", (3, 16))


def batch(
    dtype: torch.dtype = torch.float64, rows: int = 4, length: int = 3, D: int = 3, V: int = 19, seed: int = 0
) -> dict:
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    return dict(
        hidden=randn(rows, length, D).requires_grad_(), head=randn(V, D).requires_grad_(),
        ref_hidden=randn(rows, length, D), ref_head=randn(V, D),
        labels=torch.randint(0, V, (rows, length), generator=gen), shift=False,
    )  # fmt: skip


def grads(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


class GemmFlops(TorchDispatchMode):
    """Adds up 2 m n k over the matrix products that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:] if name == "mm" else args[1:3]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif name == "_linear_pointwise":  # oneDNN's a @ b^T
            self.flops += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[0]
        elif name in ("linear", "matmul", "baddbmm", "_scaled_mm"):
            raise AssertionError(f"{name} is not counted here")
        return func(*args, **(kwargs or {}))


# --- right gradients -------------------------------------------------------------------------------------------------


@backends
@budgets
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.6}], ids=["plain", "softcap"])
def test_token_stats_pass_gradcheck(backend: str, budget: int, options: dict, small_tiles):
    call = batch(rows=2, length=2, D=2)
    call["labels"][1, 0] = -100
    call["labels"][1, 1] = 18
    bias = torch.randn(19, dtype=torch.float64, requires_grad=True)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        heads = {"hidden": hidden, "head": LMHead(weight, bias, **options)}
        stats = token_stats(**call | heads, backend=backend, memory_budget=budget)
        return stats.logp, stats.kl

    assert torch.autograd.gradcheck(function, (call["hidden"], call["head"], bias))


@backends
@budgets
@pytest.mark.parametrize("options", [{"variant": "tdpo1"}, {"alpha": 0.0}], ids=str)
def test_loss_passes_gradcheck(backend: str, budget: int, options: dict, small_tiles):
    call = batch(rows=2, length=2, D=2)

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        changes = {"hidden": hidden, "head": weight}
        return fused_tdpo_loss(**call | changes, **options, beta=0.5, backend=backend, memory_budget=budget).loss

    assert torch.autograd.gradcheck(function, (call["hidden"], call["head"]))


@backends
@budgets
def test_tdpo2_passes_gradcheck_in_the_rejected_half(backend: str, budget: int, small_tiles):
    """There the stop-gradient, which finite differences do not know, stops nothing."""
    call = batch(rows=4, length=2)
    chosen = call["hidden"].detach()[:2]

    def function(rejected: Tensor) -> Tensor:
        changes = {"hidden": torch.cat([chosen, rejected]), "head": call["head"].detach()}
        return fused_tdpo_loss(**call | changes, alpha=0.8, beta=0.5, backend=backend, memory_budget=budget).loss

    assert torch.autograd.gradcheck(function, (call["hidden"].detach()[2:].clone().requires_grad_(),))


@budgets
@pytest.mark.parametrize("cotangents", ["logp only", "kl only", "equal", "opposite", "mixed rows"])
def test_tiled_is_naive_for_every_kind_of_cotangent(budget: int, cotangents: str, small_tiles):
    call = batch(length=5)
    u, v = torch.randn(2, 4, 5, dtype=torch.float64)
    zero = torch.zeros_like(u)
    u, v = {"logp only": (u, zero), "kl only": (zero, v), "equal": (u, u), "opposite": (u, -u)}.get(cotangents, (u, v))
    if cotangents == "mixed rows":
        u[0], v[1], v[2], u[3, ::2], v[3, ::2] = 0, 0, u[2], 0, 0
    leaves = call["hidden"], call["head"]
    got = []
    for backend in BACKENDS:
        stats = token_stats(**call, backend=backend, memory_budget=budget)
        got.append(grads((u * stats.logp + v * stats.kl).sum(), *leaves))
    torch.testing.assert_close(*got, rtol=1e-10, atol=1e-11)


@backends
@pytest.mark.parametrize("unused", ["kl", "logp"])
def test_an_output_that_is_not_used_is_a_zero_cotangent(backend: str, unused: str, small_tiles):
    call = batch()
    used = "logp" if unused == "kl" else "kl"
    leaves = call["hidden"], call["head"]
    a, b = (token_stats(**call, backend=backend) for _ in range(2))
    got = grads(getattr(a, used).sum(), *leaves)
    want = grads((getattr(b, used) + 0 * getattr(b, unused)).sum(), *leaves)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@budgets
def test_retained_graph_gives_the_same_gradients_twice(budget: int, small_tiles):
    call = batch(torch.float32, length=7)
    loss = fused_tdpo_loss(**call, memory_budget=budget).loss
    leaves = call["hidden"], call["head"]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for other in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@backends
def test_double_backward_is_refused(backend: str):
    call = batch()
    (g,) = torch.autograd.grad(fused_tdpo_loss(**call, backend=backend).loss, call["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()


@budgets
@pytest.mark.parametrize("name", ["hidden", "head", "ref_hidden", "ref_head", "labels"])
def test_a_change_between_forward_and_backward_is_noticed(name: str, budget: int):
    call = batch()
    loss = fused_tdpo_loss(**call, memory_budget=budget).loss
    with torch.no_grad():
        call[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_change_of_packed_labels_does_not_matter():
    call = batch() | {"shift": True}
    want = grads(fused_tdpo_loss(**call).loss, call["hidden"])
    loss = fused_tdpo_loss(**call).loss
    call["labels"].fill_(0)
    assert torch.equal(grads(loss, call["hidden"])[0], want[0])


def test_gradients_accumulate_over_micro_batches():
    whole = batch(rows=4)
    fused_tdpo_loss(**whole, reduction="sum").loss.backward()
    want = whole["head"].grad.clone()
    whole["head"].grad = None
    for pair in range(2):
        part = whole | {n: whole[n].detach()[pair::2] for n in ("hidden", "ref_hidden", "labels")}
        fused_tdpo_loss(**part, reduction="sum").loss.backward()
    torch.testing.assert_close(whole["head"].grad, want, rtol=1e-11, atol=1e-12)


@budgets
def test_backward_in_another_thread(budget: int):
    call = batch(torch.bfloat16, length=9)
    leaves = call["hidden"], call["head"]
    want = grads(fused_tdpo_loss(**call, memory_budget=budget).loss, *leaves)
    loss = fused_tdpo_loss(**call, memory_budget=budget).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert all(torch.equal(x.grad, g) for x, g in zip(leaves, want, strict=True))


def test_hooks_on_hidden_see_its_gradient_once():
    call = batch()
    seen = []
    hidden = call["hidden"] * 1.0
    hidden.register_hook(seen.append)
    fused_tdpo_loss(**call | {"hidden": hidden}).loss.backward()
    assert len(seen) == 1 and torch.equal(seen[0], call["hidden"].grad)


@backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_the_loss(backend: str, reentrant: bool):
    call = batch()
    leaves = call["hidden"], call["head"]
    want = grads(fused_tdpo_loss(**call, backend=backend).loss, *leaves)
    fixed = {n: x for n, x in call.items() if n not in ("hidden", "head")}
    loss = checkpoint(
        lambda h, w: fused_tdpo_loss(h, w, **fixed, backend=backend).loss, *leaves, use_reentrant=reentrant
    )
    loss.backward()
    assert all(torch.equal(x.grad, g) for x, g in zip(leaves, want, strict=True))


def test_saved_tensors_are_unpacked_once():
    """With `save_on_cpu`, say, each time is a copy of everything."""
    unpacked = []

    def unpack(x: Tensor) -> Tensor:
        unpacked.append(id(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        stats = token_stats(**batch())
    (stats.logp + stats.kl).sum().backward()
    assert len(unpacked) == len(set(unpacked))


def test_saved_tensors_can_be_kept_elsewhere():
    call = batch()
    leaves = call["hidden"], call["head"]
    want = grads(fused_tdpo_loss(**call).loss, *leaves)
    with torch.autograd.graph.save_on_cpu():
        loss = fused_tdpo_loss(**call).loss
    assert all(torch.equal(a, b) for a, b in zip(grads(loss, *leaves), want, strict=True))


# --- nothing that nobody wants ---------------------------------------------------------------------------------------


def backward_flops(wanted: tuple[str, ...], budget: int, backend: str = "tiled") -> tuple[float, dict]:
    """GEMM flops of a backward in units of G, with `wanted` requiring gradients."""
    call = batch(torch.float32, length=16, D=8, V=64)
    parts = {"hidden": call["hidden"], "weight": call["head"], "bias": torch.linspace(-1, 1, 64)}
    parts = {n: x.detach().requires_grad_(n in wanted) for n, x in parts.items()}
    heads = {"hidden": parts["hidden"], "head": LMHead(parts["weight"], parts["bias"])}
    stats = token_stats(**call | heads, memory_budget=budget, backend=backend)
    with GemmFlops() as gemms:
        (stats.logp - 3 * stats.kl).sum().backward()
    return gemms.flops / (2 * 64 * 64 * 8), parts


@pytest.mark.parametrize(
    "wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight", "bias")], ids=str
)
@pytest.mark.parametrize("budget, recompute", [(EVERYTHING, 0), (0, 2)])
def test_frozen_parts_cost_nothing(wanted: tuple[str, ...], budget: int, recompute: int):
    units, parts = backward_flops(wanted, budget)
    assert units == recompute + len(set(wanted) - {"bias"})
    assert all((x.grad is not None) == (n in wanted) for n, x in parts.items())


@backends
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",)], ids=str)
def test_frozen_parts_do_not_change_the_others(backend: str, wanted: tuple[str, ...]):
    _, some = backward_flops(wanted, EVERYTHING, backend)
    _, every = backward_flops(("hidden", "weight", "bias"), EVERYTHING, backend)
    for name in wanted:
        torch.testing.assert_close(some[name].grad, every[name].grad, rtol=1e-5, atol=1e-5)


@backends
def test_nothing_wanted_gives_no_graph(backend: str):
    call = {n: x.detach() if isinstance(x, Tensor) else x for n, x in batch().items()}
    out = fused_tdpo_loss(**call, backend=backend)
    assert not out.loss.requires_grad and out.loss.grad_fn is None


class Sizes(TorchDispatchMode):
    """The storages that the operations under it return."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, None], ids=["no_grad", "inference", "frozen"])
def test_nothing_is_staged_without_a_gradient(mode, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(slab.TILE, "cpu", (16, 16))
    call = batch(torch.float32, length=64, V=256)
    if mode is None:
        call |= {n: call[n].detach() for n in ("hidden", "head")}
    sizes = {}
    for name, enabled in (("with", False), ("without", True)):
        with Sizes() as seen, (mode or torch.enable_grad)() if enabled else torch.enable_grad():
            out = fused_tdpo_loss(**call, memory_budget=EVERYTHING)
        sizes[name] = seen.largest
    assert not out.loss.requires_grad
    assert sizes["without"] < 64 * 1024
    assert mode is None or sizes["with"] >= 2 * 4 * 256 * 256


@backends
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_values_are_the_same_without_a_gradient(backend: str, mode):
    call = batch(torch.float32)
    want = fused_tdpo_loss(**call, backend=backend)
    with mode():
        got = fused_tdpo_loss(**call, backend=backend)
    assert torch.equal(got.loss, want.loss) and not got.loss.requires_grad
    assert got.loss.is_inference() == (mode is torch.inference_mode)


def test_a_reference_computed_in_inference_mode_can_be_trained_against():
    """`with torch.inference_mode(): ref_hidden = ref_model(...)` is how people run a reference model."""
    call = batch()
    want = grads(fused_tdpo_loss(**call).loss, call["head"])
    with torch.inference_mode():
        ref_hidden = call["ref_hidden"] * 1.0
    got = grads(fused_tdpo_loss(**call | {"ref_hidden": ref_hidden}).loss, call["head"])
    assert torch.equal(got[0], want[0])


def test_reference_is_asked_for_no_gradient():
    call = batch()
    call["ref_hidden"].requires_grad_(), call["ref_head"].requires_grad_()
    with GemmFlops() as gemms:
        fused_tdpo_loss(**call, memory_budget=EVERYTHING).loss.backward()
    assert gemms.flops == 4 * 2 * 12 * 19 * 3
    assert call["ref_hidden"].grad is None and call["ref_head"].grad is None


# --- what a backward costs, section 4 --------------------------------------------------------------------------------

T, WIDTH, VOCAB = 32, 8, 64
G = 2 * T * VOCAB * WIDTH


@pytest.fixture
def half_and_half(monkeypatch: pytest.MonkeyPatch):
    """Row blocks of 16: the chosen rows are one, the rejected the other."""
    monkeypatch.setitem(slab.TILE, "cpu", (16, 16))


def cost(objective, budget: int, head=lambda w: w) -> tuple[float, float]:
    """Forward and backward GEMM flops in units of G."""
    call = batch(torch.float32, rows=2, length=16, D=WIDTH, V=VOCAB) | {"memory_budget": budget}
    call["head"] = head(call["head"])
    with GemmFlops() as forward:
        loss = objective(call)
    with GemmFlops() as backward:
        loss.backward()
    return forward.flops / G, backward.flops / G


def fused(**options):
    return lambda call: fused_tdpo_loss(**call, **options).loss


def weighted(g_logp: Tensor | None, g_kl: Tensor | None):
    def objective(call: dict) -> Tensor:
        stats = token_stats(**call)
        pairs = ((stats.logp, g_logp), (stats.kl, g_kl))
        return sum((x * g).sum() for x, g in pairs if g is not None)

    return objective


ROWS = torch.arange(1.0, T + 1).view(2, 16)
FIRST_HALF = ROWS * torch.tensor([[1.0], [0.0]])
COSTS = {
    "dpo": (fused(alpha=0.0), 1.0, 2.0),
    "tdpo1": (fused(variant="tdpo1"), 1.0, 2.0),
    "tdpo2": (fused(alpha=0.5), 1.5, 2.0),
    "general": (weighted(ROWS, -ROWS), 2.0, 2.0),
    "logp only": (weighted(ROWS, None), 1.0, 2.0),
    "kl only": (weighted(None, ROWS), 2.0, 2.0),
    "equal": (weighted(ROWS, ROWS), 1.0, 2.0),
    "half the rows, logp": (weighted(FIRST_HALF, None), 0.5, 1.0),
    "half the rows, both": (weighted(FIRST_HALF, -FIRST_HALF), 1.0, 1.0),
    "no row": (weighted(0 * ROWS, 0 * ROWS), 0.0, 0.0),
}


@pytest.mark.parametrize("objective, recompute, products", COSTS.values(), ids=COSTS)
def test_backward_recomputes_what_its_rows_need_and_no_more(
    objective, recompute: float, products: float, half_and_half
):
    assert cost(objective, 0) == (2.0, recompute + products)


@pytest.mark.parametrize("objective, recompute, products", COSTS.values(), ids=COSTS)
def test_a_staged_backward_recomputes_nothing(objective, recompute: float, products: float, half_and_half):
    assert cost(objective, EVERYTHING) == (2.0, products)


def test_half_a_budget_is_half_a_recomputation(half_and_half):
    tile = int(2 * 16 * 16 * 4 * 1.12)  # p and t, and a few numbers per row
    assert [cost(fused(variant="tdpo1"), n * tile)[1] for n in (0, 2, 4, 8)] == [3.0, 2.75, 2.5, 2.0]


def test_softcap_costs_tdpo1_the_policy_s_logits(half_and_half):
    """Its slope needs z, whatever else is needed."""
    softcapped = {"head": lambda w: LMHead(w, softcap=5.0)}
    assert cost(fused(variant="tdpo1"), 0, **softcapped) == (2.0, 4.0)
    assert cost(fused(alpha=0.0), 0, **softcapped) == (2.0, 3.0)
    assert cost(fused(variant="tdpo1"), EVERYTHING, **softcapped) == (2.0, 2.0)


def test_ignored_rows_cost_nothing(half_and_half):
    call = batch(torch.float32, rows=2, length=32, D=WIDTH, V=VOCAB)
    call["labels"][:, ::2] = -100
    with GemmFlops() as gemms:
        fused_tdpo_loss(**call, memory_budget=EVERYTHING).loss.backward()
    assert gemms.flops == 4 * G


# --- mixed precision -------------------------------------------------------------------------------------------------


def plain_tdpo2(call: dict, alpha: float = 0.5, beta: float = 0.1) -> Tensor:
    """The loss as people write it, logits widened to at least fp32 after the product."""

    def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
        z = F.linear(hidden, weight)
        return (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)

    log_p, log_q = (log_probs(call[h], call[w]) for h, w in (("hidden", "head"), ("ref_hidden", "ref_head")))
    pick = call["labels"][..., None]
    margin = (log_p - log_q).gather(-1, pick)[..., 0].sum(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum((-1, -2))
    half = len(margin) // 2
    h = margin[:half] - margin[half:] - alpha * (kl[half:] - kl[:half].detach())
    return -F.logsigmoid(beta * h).mean()


FLOATS = ("hidden", "head", "ref_hidden", "ref_head")
PRECISIONS = {
    "fp32 hidden, fp32 head": (torch.float32, torch.float32),
    "bf16 hidden, fp32 head": (torch.bfloat16, torch.float32),
    "fp32 hidden, bf16 head": (torch.float32, torch.bfloat16),
    "bf16 hidden, bf16 head": (torch.bfloat16, torch.bfloat16),
}


def mixed(dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[dict, dict]:
    """A call in `dtypes`, and the same values, rounded to bf16, in float64."""
    call = batch(torch.float64, length=6, D=16, V=97)
    call |= {n: (call[n] * 0.6).detach().to(dtypes["head" in n]) for n in FLOATS}
    exact = call | {n: call[n].bfloat16().double() for n in FLOATS}
    for each in (call, exact):
        each["hidden"].requires_grad_(), each["head"].requires_grad_()
    return call, exact


@backends
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("dtypes", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("budget", [0, EVERYTHING])
def test_autocast_is_f_linear_s(backend: str, inside: bool, dtypes: tuple, budget: int):
    call, exact = mixed(dtypes)
    leaves = call["hidden"], call["head"]
    results = []
    for function in (
        lambda: fused_tdpo_loss(**call, backend=backend, memory_budget=budget).loss,
        lambda: plain_tdpo2(call),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function()
            got = grads(loss, *leaves) if inside else None
        results.append([loss, *(got or grads(loss, *leaves))])
    truth = plain_tdpo2(exact)
    truth = [truth, *grads(truth, exact["hidden"], exact["head"])]
    for ours, plain, true in zip(*results, truth, strict=True):
        assert ours.dtype == plain.dtype
        assert relative(ours, true) <= 2 * relative(plain, true) + 4e-3


def test_autocast_leaves_float64_alone():
    call = batch()
    want = fused_tdpo_loss(**call).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_tdpo_loss(**call).loss, want)


@backends
def test_autocast_rounds_operands_to_its_dtype(backend: str):
    """fp32 operands are rounded, not the logits: the statistics are those of the rounded operands to fp32 accuracy."""
    call, exact = mixed((torch.float32, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got = token_stats(**call, backend=backend)
    want = token_stats(**exact, backend="naive")
    assert relative(got.logp, want.logp) < 1e-6 and relative(got.kl, want.kl) < 1e-5
    assert relative(token_stats(**call, backend=backend).logp, want.logp) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("budget", [0, EVERYTHING])
def test_tiny_cotangents_do_not_underflow(dtype: torch.dtype, budget: int):
    """Every row of W carries the same large number, so dh cancels only if the small entries of dz are all there."""
    call = batch(dtype, length=4, D=4, V=4096)
    weight = call["head"].detach().float() * 0.1
    weight[:, 0] = 16.0
    head, hidden = weight.to(dtype).requires_grad_(), (call["hidden"].detach() * 0.1).requires_grad_()
    ref = {"ref_hidden": call["ref_hidden"] * 0.1, "ref_head": call["ref_head"] * 0.1}
    stats = token_stats(**call | ref | {"head": head, "hidden": hidden}, memory_budget=budget)
    for scale in (1.0, 2.0**-13):
        (g,) = torch.autograd.grad((stats.logp * scale).sum(), hidden, retain_graph=True)
        assert g[..., 0].abs().max() <= 0.02 * 16.0 * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_power_of_two_cotangents_scale_gradients_exactly(dtype: torch.dtype):
    call = batch(dtype, length=6, D=8, V=300)
    stats = token_stats(**call)
    big, small = (grads_of(stats, call, scale) for scale in (1.0, 2.0**-6))
    for a, b in zip(big, small, strict=True):
        torch.testing.assert_close(b.float() * 2.0**6, a.float(), rtol=2e-2, atol=1e-3)


def grads_of(stats, call: dict, scale: float) -> tuple[Tensor, ...]:
    loss = ((stats.logp - stats.kl) * scale).sum()
    return torch.autograd.grad(loss, (call["hidden"], call["head"]), retain_graph=True)


def test_huge_fp16_cotangents_do_not_overflow():
    call = batch(torch.float16, length=4, D=4, V=50)
    stats = token_stats(**call)
    (g,) = torch.autograd.grad((stats.logp * 2.0**15).sum() * 2.0**-3, call["hidden"], retain_graph=True)
    (unit,) = torch.autograd.grad(stats.logp.sum(), call["hidden"])
    assert g.isfinite().all()
    torch.testing.assert_close(g.float() / 2.0**12, unit.float(), rtol=1e-2, atol=1e-3)


# --- what comes out belongs to who asked for it ----------------------------------------------------------------------


@backends
@pytest.mark.parametrize("shape", [(12,), (4, 3)], ids=str)
@pytest.mark.parametrize("ignored", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("name", ["logp", "ref_logp", "kl", "entropy"])
def test_statistics_may_be_changed_in_place(backend: str, shape: tuple[int, ...], ignored: bool, name: str):
    """They are nobody's views, and share no memory with what backward needs."""
    call = batch()
    call |= {n: call[n].detach().view(*shape, -1) for n in ("hidden", "ref_hidden")}
    call["hidden"].requires_grad_()
    call["labels"] = call["labels"].clone().view(shape)
    if ignored:
        call["labels"].view(-1)[::3] = -100

    def gradients(change) -> list[Tensor]:
        stats = token_stats(**call, extras=("entropy",), backend=backend)
        every = dict(logp=stats.logp, ref_logp=stats.ref_logp, kl=stats.kl, **stats.extras)
        every[name] = change(every[name])
        return grads((every["logp"] - 3 * every["kl"] + every["entropy"]).sum(), call["hidden"], call["head"])

    got, want = gradients(lambda x: x.mul_(2)), gradients(lambda x: x * 2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- how often the device is read ------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """What makes the host wait for a CUDA device: values read, and shapes that depend on values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        for name in ("tolist", "item", "__bool__", "__int__", "__index__", "__float__", "numpy"):
            monkeypatch.setattr(Tensor, name, self._noting(name, getattr(Tensor, name)))

    def _noting(self, name: str, method):
        def noted(x: Tensor, *args):
            self.seen.append(name)
            with torch.utils._python_dispatch._disable_current_modes():
                return method(x, *args)

        return noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [x for x in (args[1] if name in ("index", "index_put", "index_put_") else ()) if x is not None]
        if name in ("nonzero", "masked_select", "_local_scalar_dense", "equal", "unique_dim", "_unique2") or any(
            x.dtype == torch.bool for x in masks
        ):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("ignored", [False, True], ids=["all rows", "some rows"])
def test_a_call_reads_the_device_once(packed: bool, shift: bool, ignored: bool, monkeypatch: pytest.MonkeyPatch):
    """All of it in `pack`. (The naive backend: the tiled one looks at its tiles, on a CPU only.)"""
    call = batch() | {"shift": shift}
    if ignored:
        call["labels"][:, 1] = -100
    if packed:
        call |= {n: call[n].detach().flatten(0, 1) for n in ("hidden", "ref_hidden", "labels")}
        call["cu_seqlens"] = torch.tensor([0, 3, 6, 9, 12])
    with HostReads(monkeypatch) as reads:
        token_stats(**call, backend="naive")
    assert reads.seen == ["tolist"]


@pytest.mark.parametrize("shift", [False, True])
def test_padded_rows_that_all_count_need_no_read(shift: bool, monkeypatch: pytest.MonkeyPatch):
    """On a CPU the range of the labels is read all the same: looking is free there."""
    labels = batch()["labels"]
    with HostReads(monkeypatch) as reads:
        rows = pack(Elsewhere(labels), None, 19, ignore_index=None, shift=shift)
    assert reads.seen == []
    want = pack(labels, None, 19, ignore_index=None, shift=shift)
    for got, also in ((rows.hidden_T, want.hidden_T), (rows.label_T, want.label_T), (rows.labels_T, want.labels_T)):
        assert got is also is None or torch.equal(got, also)


def test_sequences_of_no_tokens_at_the_end_take_no_label():
    """They begin at N, where there is none to take."""
    labels = torch.arange(9)
    rows = pack(labels, torch.tensor([0, 3, 5, 9, 9, 9]), 19, ignore_index=None, shift=True)
    assert rows.label_T.tolist() == [1, 2, 4, 6, 7, 8] and rows.hidden_T.tolist() == [0, 1, 3, 5, 6, 7]


class Elsewhere(Tensor):
    """A tensor that says it is not on a CPU."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Elsewhere:
        return x.as_subclass(cls)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")
