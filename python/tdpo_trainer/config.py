"""`TDPOConfig`: what can be set about a run with TRL."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields

import torch
from trl import DPOConfig

from .step import LossOptions, refuse_torch_compile

DPO = "it is an option of DPO's loss, not of TDPO's"
LIGER = "Liger's kernels are of DPO's loss and of models that make logits; this loss never makes them either"
METRICS = "it is for functions of logits, which TDPO never makes"
FIXED = {  # options that would be silently without effect, at the only value they may have, and why
    "loss_type": (["sigmoid"], DPO),
    "loss_weights": (None, DPO),
    "ld_alpha": (None, DPO),
    "f_divergence_type": ("reverse_kl", DPO),
    "f_alpha_divergence_coef": (getattr(DPOConfig, "f_alpha_divergence_coef", None), DPO),
    "discopop_tau": (getattr(DPOConfig, "discopop_tau", None), DPO),
    "label_smoothing": (0.0, DPO),
    "label_smoothing_factor": (0.0, DPO),
    "use_weighting": (False, DPO),
    "use_liger_kernel": (False, LIGER),
    "liger_kernel_config": (None, LIGER),
    "include_for_metrics": ([], METRICS),
    "batch_eval_metrics": (False, METRICS),
}
REFUSED = (*FIXED, "torch_compile", "torch_compile_backend", "torch_compile_mode")  # no help mentions these


@dataclass
class TDPOConfig(DPOConfig):
    """`trl.DPOConfig` with what TDPO adds. Options of DPO that have no meaning here are refused by name.

    Args:
        variant: ``"tdpo2"`` or ``"tdpo1"``. TDPO1 is not TDPO2 with ``alpha=1``: same value, other gradient.
        alpha: >= 0, the weight of the KL difference in TDPO2; None means 0.5, and ``alpha=0`` is DPO. TDPO1 has none:
            giving it raises.
        beta: > 0, default 0.1, inherited.
        backend: of `tdpo_kernels`: ``"auto"``, ``"fused"``, ``"tiled"`` or ``"naive"``.
        memory_budget: bytes kept from forward to backward, to save recomputation.
        sft_weight: >= 0, of a term added to each pair's loss: the chosen completion's mean negative log-probability a
            token, as LLaMA-Factory's ``pref_ftx``.
        length_normalized: log-ratios and KLs are means over a completion's tokens instead of sums.
        padding_free: the model gets a batch as one row of tokens without padding, where its attention keeps sequences
            apart (checked on the first batch); inherited. The loss itself never spends anything on padding.
        reference_cache: a directory. The reference's hidden states are written there before training, or found there,
            and no reference model is kept. ``precompute_ref_log_probs=True`` is the same with
            ``<output_dir>/reference_cache``.
        pairs_per_step: pairs per optimizer step over all processes: sets ``gradient_accumulation_steps``, so that one
            command trains alike on any number of processes. Those that share a batch by tensor parallelism count once.
            Where it does not divide an epoch, that epoch's last step takes what is left: there a pair of a smaller
            micro-batch weighs more, and several processes repeat some pairs to even out their batches.

        samples: evaluation prompts whose completions by the model are written to ``samples.txt`` in `output_dir`, and
            sent to the trackers of TRL's `LogCompletionsCallback`, at each evaluation.

    ``bf16`` left unset is on where there is an accelerator, and off on a CPU.

    Raises:
        TypeError, ValueError: naming the option, what was seen and what is wanted.
    """

    beta: float = field(default=0.1, metadata={"help": "how strongly the policy is pulled towards the reference; > 0"})
    variant: str = field(default="tdpo2", metadata={"help": "tdpo2 or tdpo1", "choices": ["tdpo1", "tdpo2"]})
    alpha: float | None = field(
        default=None, metadata={"help": "weight of TDPO2's KL difference, 0.5 if unset; 0 is DPO; TDPO1 has none"}
    )
    backend: str = field(default="auto", metadata={"help": "backend of tdpo_kernels: auto, fused, tiled or naive"})
    memory_budget: int = field(default=2**30, metadata={"help": "bytes kept from forward to backward"})
    padding_free: bool = field(
        default=False, metadata={"help": "one row of tokens without padding, where the attention keeps sequences apart"}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "weight of the chosen completion's negative log-probability a token"}
    )
    length_normalized: bool = field(
        default=False, metadata={"help": "means over a completion's tokens instead of sums, in log-ratios and KLs"}
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "directory of the reference's hidden states, written where it is incomplete"}
    )
    pairs_per_step: int | None = field(
        default=None,
        metadata={"help": "pairs per optimizer step, fewer in an epoch's last; sets gradient accumulation"},
    )
    samples: int = field(
        default=0, metadata={"help": "evaluation prompts whose completions go to samples.txt at each evaluation"}
    )

    def __post_init__(self) -> None:
        expand_home(self)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _has_accelerator()
        if self.pairs_per_step is not None:
            given, steps = self.gradient_accumulation_steps, self.accumulation(self._data_parallel())
            if given not in (1, steps):
                raise ValueError(f"gradient_accumulation_steps: got {given} with pairs_per_step, wanted one of them")
            self.gradient_accumulation_steps = steps
        super().__post_init__()
        self._refuse_what_has_no_effect()
        refuse_torch_compile(self)
        self.loss_options()
        if self.reference_cache is not None:
            self.precompute_ref_log_probs = True
        elif self.precompute_ref_log_probs:
            self.reference_cache = os.path.join(self.output_dir, "reference_cache")
        if self.reference_cache is not None and self.sync_ref_model:
            raise ValueError(
                "sync_ref_model: got True with reference_cache, wanted one of them: a reference that changes during "
                "training cannot be computed beforehand"
            )

    def loss_options(self) -> LossOptions:
        return LossOptions(**{x.name: getattr(self, x.name) for x in fields(LossOptions)})

    def _data_parallel(self) -> int:
        """Return the processes with pairs of their own, as far as is known before there is a model."""
        tensor_parallel = getattr(getattr(self, "parallelism_config", None), "tp_size", None)
        tensor_parallel = tensor_parallel or os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1")
        return max(1, int(os.environ.get("WORLD_SIZE", "1")) // int(tensor_parallel))

    def accumulation(self, processes: int) -> int:
        """Return the micro-batches of a step that make ``pairs_per_step`` of them on so many processes."""
        at_once = self.per_device_train_batch_size * processes
        if self.pairs_per_step < at_once or self.pairs_per_step % at_once:
            raise ValueError(
                f"pairs_per_step: got {self.pairs_per_step}, wanted a multiple of {at_once} = "
                f"per_device_train_batch_size {self.per_device_train_batch_size} x {processes} processes"
            )
        return self.pairs_per_step // at_once

    def _refuse_what_has_no_effect(self) -> None:
        for name, (only, why) in FIXED.items():
            seen = getattr(self, name, only)
            if getattr(seen, "value", seen) != only:
                raise ValueError(f"{name}: got {seen!r}, wanted {only!r}: {why}")


def expand_home(options: object) -> None:
    """Replace a leading ``~`` by the home directory in every option that is a text."""
    for name, value in list(vars(options).items()):
        if isinstance(value, str) and value.startswith("~"):
            setattr(options, name, os.path.expanduser(value))


def _has_accelerator() -> bool:
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != "mps"
