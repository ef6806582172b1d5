"""Name what is measured: sizes, and for each the dtypes, contenders and rounds that answer its question.

Sizes are those of real models (`MODELS`). A CPU gets a cut of them, ``<model>/<n>``: V and D divided by n, so that
V / D, which decides how much the vocabulary costs, stays the model's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Model(NamedTuple):
    V: int
    D: int
    cut: int  # what a CPU gets is this much smaller
    softcap: float | None = None


MODELS = {
    "gpt2": Model(50257, 768, 4),
    "pythia-2.8b": Model(50304, 2560, 4),  # the paper's
    "llama-3.2-1b": Model(128256, 2048, 8),
    "llama-3.1-8b": Model(128256, 4096, 8),
    "qwen2.5-0.5b": Model(151936, 896, 4),
    "qwen3-8b": Model(151936, 4096, 8),
    "gemma-2-2b": Model(256000, 2304, 8, softcap=30.0),
    "gemma-3-1b": Model(262144, 1152, 8),
    "mistral-7b": Model(32768, 4096, 8),
}

LAYOUTS = ("contiguous", "transposed", "slice", "every-other-row", "every-other-column", "hidden-rows")
CUDA = dict(device="cuda", dtypes=("bfloat16",))
OURS = ("ours@all", "ours@0")
EVERYONE = ("floor", "eager", "compiled", "trl", "liger", "cce", "linear_ce", *OURS)
FULL = ("floor", "eager", "trl", "linear_ce", *OURS)  # what runs on a CPU, but for the compiler's minutes
WHOLE = ("floor", "eager", "trl", *OURS)  # of those, who computes all of it
BUDGETS = ("floor", "eager", "ours@0", "ours@32MB", "ours@64MB", "ours@128MB", "ours@all")
KERNELS = ("fused@0", "fused@all", "tiled@0", "tiled@all")


@dataclass(frozen=True)
class Shape:
    """Describe T tokens in 2 * pairs sequences of one length, V words and D features in both models."""

    name: str
    T: int
    V: int
    D: int
    asks: str  # the question this shape answers
    contenders: tuple[str, ...]
    rounds: int
    dtypes: tuple[str, ...] = ("float32",)
    pairs: int = 2
    calls: int = 1  # timed calls per round, where one is too short for the clock
    valid: float = 1.0  # of each sequence's tokens; the others are a prompt, and masked
    trainable: bool = True  # the policy's head; False: frozen
    one_head: bool = False  # the reference has the policy's head
    peaked: bool = False  # logits of standard deviation 8, not 1
    gradients: bool = True  # False: forward alone, under `torch.no_grad`
    layout: str = "contiguous"  # how heads or hidden states lie in memory, one of LAYOUTS
    softcap: float | None = None
    drift: float | None = None  # accuracy is measured, not time, at so many nats per token between the models
    model: dict[str, int] | None = field(default=None, hash=False)  # a whole training step is measured, of such a Llama
    limit: int = 0  # bytes above model, gradients and optimiser in which the longest context is searched
    family: str = ""  # chosen by `--shapes` like a name, and one figure of the report
    device: str = "cpu"  # where it is measured by default: "cpu", "cuda", "any", or "" for nowhere

    @property
    def rows(self) -> int:
        """The number of tokens that count."""
        return 2 * self.pairs * round(self.valid * (self.T // (2 * self.pairs)))


def _models() -> list[Shape]:
    cuts, whole = [], []
    for name, (V, D, cut, softcap) in MODELS.items():
        common = dict(softcap=softcap, family="models")
        asks = f"{name}'s head, V and D divided by {cut}"
        cuts.append(Shape(f"{name}/{cut}", 512, V // cut, D // cut, asks, WHOLE, 3, **common))
        everyone, bf16 = EVERYONE + KERNELS, ("bfloat16",)
        whole.append(Shape(name, 8192, V, D, f"{name}'s head", everyone, 10, bf16, device="cuda", **common))
    return cuts + whole


def _rows() -> list[Shape]:
    V, D, _, _ = MODELS["llama-3.1-8b"]
    cpu = ((256, FULL, 7), (1024, FULL, 5), (4096, FULL, 3), (16384, ("floor", "eager", *OURS), 2),
           (131072, ("floor", "eager", "ours@0"), 1))  # fmt: skip
    asks, whole = "llama-3.1-8b/16 as rows grow", dict(asks="llama-3.1-8b as rows grow", dtypes=("bfloat16",))
    who = ("floor", "eager", "trl", "liger", "cce", "linear_ce", *OURS)
    return [
        *(Shape(f"rows-{T}", T, V // 16, D // 16, asks, who, rounds, family="rows") for T, who, rounds in cpu),
        *(Shape(f"gpu-rows-{T}", T, V, D, contenders=who, rounds=5, family="rows", device="cuda", **whole)
          for T in (256, 1024, 4096, 16384, 65536, 131072)),
    ]  # fmt: skip


def _settings() -> list[Shape]:
    """Return one size with one condition changed at a time."""
    changed = {
        "plain": ("everything as elsewhere", {}),
        "prompts": ("three tokens of four are a prompt", {"valid": 0.25}),
        "frozen": ("a frozen head", {"trainable": False}),
        "one-head": ("the reference has the policy's head", {"one_head": True}),
        "peaked": ("logits of standard deviation 8", {"peaked": True}),
    }
    V, D, _, _ = MODELS["llama-3.1-8b"]
    who = ("floor", "eager", "linear_ce", *OURS)
    return [
        Shape(name, 2048, V // 16, D // 16, f"llama-3.1-8b/16, {asks}", who, 3, family="settings", **how)
        for name, (asks, how) in changed.items()
    ]


def _drift() -> list[Shape]:
    asks, both, who = "accuracy with drift", ("float32", "bfloat16"), ("eager", "compiled", "trl", "liger", *OURS)
    return [
        Shape(f"drift-{nats:.0e}", 64, 4099, 128, asks, who, 1, both, drift=nats, family="drift", device="any")
        for nats in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 3.0, 10.0)
    ]


def _steps() -> list[Shape]:
    """Return whole training steps: of T tokens, and of as many as fit."""
    names = ("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "tie_word_embeddings")  # fmt: skip
    who, asks, kinds, found = ("eager", "trl", "ours@512MB", "ours@0"), "a whole training step", ("step", "context"), []
    for name, T, V, D, model, limit, how in (
        ("tiny", 2048, 32000, 256, (688, 4, 4, 4, False), 10**9, dict(device="cpu")),
        ("tiny lora", 2048, 32000, 256, (688, 4, 4, 4, False), 10**9, dict(device="cpu", trainable=False)),
        ("smallest", 64, 500, 32, (64, 1, 2, 2, False), 3 * 10**7, dict(device="", pairs=1)),
        ("qwen2.5-0.5b", 8192, 151936, 896, (4864, 24, 14, 2, True), 40 * 10**9, CUDA),
        ("llama-3.2-1b", 8192, 128256, 2048, (8192, 16, 32, 8, True), 40 * 10**9, CUDA),
    ):
        how = how | dict(family="step", model=dict(zip(names, model, strict=True)))
        found += [Shape(f"{x} {name}", T, V, D, asks, who, 3, limit=limit * (x == "context"), **how) for x in kinds]
    return found


def _strided() -> list[Shape]:
    """Each layout beside its contiguous twin, which has the same numbers: law 7 allows it three times the time."""
    who, both = ("floor", "eager", *OURS), ("float32", "bfloat16")
    return [
        Shape(
            f"strided-{V}/{layout}", T, V, D, layout, who, 5, both, calls=3, layout=layout, family="strided", device=""
        )
        for T, V, D in ((128, 2048, 128), (512, 8192, 256))
        for layout in LAYOUTS
    ]


def _narrow() -> list[Shape]:
    """Return shapes with few rows or few columns, where tiles are mostly edges."""
    who, asks = ("floor", "eager", *OURS), "one side of the logits is narrow"
    sizes = ((2, 151936, 64, ("bfloat16",)), (16, 151936, 256, ("bfloat16",)), (32768, 17, 64, ("float32", "bfloat16")))
    return [
        Shape(f"narrow-{T}x{V}", T, V, D, asks, who, 5, dtypes, pairs=1, family="narrow", device="")
        for T, V, D, dtypes in sizes
    ]


def _pairs() -> list[Shape]:
    """Return batches whose logits do not fit: what blocks of rows (frozen) and groups of pairs (trained) cost."""
    asks, both = "140 MB kept, beside everything kept", ("float32", "bfloat16")
    who = ("floor", "eager", "ours@0", "ours@140MB", "ours@all")
    size = dict(V=32000, D=1024, rounds=5, family="pairs", device="")
    return [
        Shape("pairs-4", 2048, asks=asks, contenders=who, dtypes=both, pairs=4, **size),
        Shape("pairs-4-frozen", 2048, asks=asks, contenders=who, dtypes=both, pairs=4, trainable=False, **size),
        Shape("pairs-16", 8192, asks=asks, contenders=("floor", "ours@140MB"), pairs=16, **size),
    ]  # fmt: skip


_V, _D = MODELS["llama-3.1-8b"].V // 16, MODELS["llama-3.1-8b"].D // 16
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("cpu-32k", 2048, 32000, 1024, "time and memory against everyone", EVERYONE + ("ours@300MB", "fused@0"), 3,
              ("float32", "bfloat16"), family="anchor"),
        Shape("cpu-152k", 1024, 151936, 896, "Qwen2.5-0.5B's whole head", ("floor", "eager", "compiled", *OURS), 3,
              family="anchor"),
        *_models(),
        *_rows(),
        *_settings(),
        *_strided(),
        *_narrow(),
        *_pairs(),
        *_drift(),
        *_steps(),
        Shape("budget", 4096, _V, _D, "llama-3.1-8b/16, time against memory", BUDGETS, 4, family="budget"),
        Shape("small", 64, 1000, 64, "overhead per call", ("floor", "eager", *OURS), 50, calls=10, family="small"),
        Shape("tiny", 32, 500, 32, "does the benchmark itself work", ("floor", "eager", "trl", "linear_ce", *OURS), 5,
              ("float32", "bfloat16"), calls=5, family="quick", device=""),
    )
}  # fmt: skip
QUICK = ("tiny", "drift-1e-08", "drift-1e-03", "drift-1e+00", "step smallest", "context smallest")
