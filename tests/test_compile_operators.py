"""Hold the operators of `torch.compile` by themselves, and the errors of calls that are wrong."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from batches import D, E, L, P, V
from batches import batch as plain_batch
from test_compile import EXTRAS, batch, compiled, fresh, packed  # noqa: F401, `fresh` is used by itself
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tdpo_kernels import LMHead, fused_tdpo_loss, token_stats

WRONG = {
    "ref_hidden|(4, 10, 6)|(4, 9, E)": dict(ref_hidden=torch.zeros(2 * P, L + 1, E)),
    "labels|float32|int64": dict(labels=torch.zeros(2 * P, L)),
    "beta|-1.0|> 0": dict(beta=-1.0),
    "alpha|tdpo1": dict(alpha=0.5, variant="tdpo1"),
    "backend|fast|auto": dict(backend="fast"),
    "head.weight|float16|float32": dict(head=torch.zeros(V, D).half()),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_call_that_is_wrong_whatever_the_values_is_refused_while_compiling(words: str):
    with pytest.raises(Exception) as error:  # noqa: B017
        compiled(lambda **call: fused_tdpo_loss(**call))(**batch() | WRONG[words])
    assert all(word in str(error.value) for word in words.split("|"))


def test_wrong_values_are_refused_when_it_runs():
    whole, call = compiled(lambda **call: fused_tdpo_loss(**call)), batch()
    whole(**call)
    labels = call["labels"].clone()
    labels[1, 4] = 40
    with pytest.raises(ValueError, match=r"labels: 1 label\(s\) outside \[0, 37\), the first is 40"):
        whole(**call | {"labels": labels})
    call = packed((5, 0, 7, 3))
    with pytest.raises(ValueError, match="cu_seqlens: decreases from 5 to 3"):
        compiled(lambda **call: fused_tdpo_loss(**call))(**call | {"cu_seqlens": torch.tensor([0, 5, 3, 12, 15])})


# --- the operators by themselves -------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Notes the library's operators as they are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "tdpo_kernels":
            detached = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
            self.seen.append((func, tuple(detached), out))
        return out


def operators(call: dict, **options) -> list[tuple]:
    """Return the operators that a graph has of a call and of its backward."""
    with Calls() as calls, mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        out = token_stats(**call, **options)
        if out.logp.requires_grad:
            (out.logp - 3 * out.kl).sum().backward()
    return calls.seen


def full(dtype: torch.dtype = torch.float32, **heads) -> dict:
    """Return a call that fills all that is kept, which opcheck compares as well: every row counts, in whole tiles."""
    return plain_batch(dtype, length=9, D=8, V=32) | heads


SAMPLES = {
    "padded": lambda: operators(full()),
    "bf16, some kept": lambda: operators(full(torch.bfloat16), memory_budget=4 * 5 * 16 * 8),
    "nothing kept": lambda: operators(batch(), memory_budget=0),
    "packed": lambda: operators(packed((5, 0, 7, 3)), memory_budget=0),
    "bias, softcap, extras": lambda: operators(
        full(head=LMHead(full()["head"], torch.zeros(32, requires_grad=True), 0.5, 7.0)), extras=EXTRAS
    ),
    "frozen head": lambda: operators(full(head=full()["head"].detach())),
    "naive, no shift": lambda: operators(full(), backend="naive"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str):
    """A traced call is the two operators, and they keep the rules of torch's operators."""
    seen = SAMPLES[name]()
    assert [func.overloadpacket.__name__ for func, *_ in seen] == ["token_stats", "token_stats_backward"]
    for func, args, _ in seen:
        torch.library.opcheck(func, args)
