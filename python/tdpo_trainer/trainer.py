"""`TDPOTrainer`: TDPO on top of TRL's `DPOTrainer`, which keeps all but the loss and where the reference comes from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl
from accelerate import DistributedType
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel
from trl import DPOTrainer

from . import fingerprint, reference
from .attach import COLUMNS, CachedCollator, attach, is_attached
from .cache import CacheError, ReferenceCache
from .config import TDPOConfig
from .data import Pairs, prepared
from .fill import Source, write_cache
from .forward import Reference
from .kernels import LMHead, on_device
from .mixin import TDPOMixin
from .parallelism import copies_of_a_batch
from .record import Record
from .redirect import instead, refuse_compiled
from .report import report, table
from .samples import Samples
from .step import Batch, datasets_of, refuse_functions_of_logits


class TDPOTrainer(TDPOMixin, DPOTrainer):
    """TRL's `DPOTrainer` with the TDPO loss, its KL over the whole vocabulary, and no ``[tokens, vocabulary]``.

    The arguments are `DPOTrainer`'s, ``args`` a `TDPOConfig`; so are the data format, PEFT (the reference is the model
    without its adapter, or its ``"ref"`` adapter), evaluation, checkpoints. The loss is computed within the forward of
    whatever wraps the model, so that DDP, FSDP and ZeRO-3 see its gradients; it is the mean over the pairs of a
    micro-batch.

    Logged are TRL's names, and ``kl/chosen``, ``kl/rejected``, ``kl/margin`` (chosen - rejected), in nats summed over a
    completion. ``rewards/*`` are the paper's: ``beta * (log-ratio + KL)``, so they include the KL, unlike DPO's.

    Raises:
        TypeError, ValueError: for an option that would be without effect, naming it; for a model that has no linear
            head (`UnsupportedModel`); for a reference cache that is not this run's (`CacheError`).
        RuntimeError: where this version of TRL computes its loss in another way than this class replaces.
    """

    _tag_names = ["trl", "tdpo"]
    _name = "TDPO"
    _paper = {
        "title": "Token-level Direct Preference Optimization",
        "id": "2404.11999",
        "citation": "@inproceedings{zeng2024tdpo, title={{Token-level Direct Preference Optimization}}, year=2024,\n"
        "author={Yongcheng Zeng and Guoqing Liu and Weiyu Ma and Ning Yang and Haifeng Zhang and Jun Wang},\n"
        "booktitle={International Conference on Machine Learning}, eprint={arXiv:2404.11999}}",
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: TDPOConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = TDPOConfig(output_dir=_output_dir(model)) if args is None else args
        _check_arguments(args, kwargs)
        refuse_compiled(*(x for x in (model, ref_model) if isinstance(x, nn.Module)))
        if ref_model is None and isinstance(model, nn.Module) and is_peft_model(model):
            reference.check_own_reference(model)  # before TRL adds a copy of its adapter
        if ref_model is None and args.reference_cache is None and kwargs.get("peft_config") is None:
            ref_model = _initial(model)
        self.begin(args.loss_options(), args, args.padding_free)
        self._report: dict[str, Any] = {}
        self._caches: dict[str, ReferenceCache] = {}
        self._ref_head: LMHead | None = None
        self._initialised = self._ref_model_left = False
        self._own_reference = ref_model is None
        self._model_digests: dict[str, str] | None = None
        if args.reference_cache is not None and ref_model is not None and args.process_index == 0:
            self._model_digests = _model_digests(ref_model)  # before it is sharded
        with instead(args, "padding_free", False):  # of which TRL says that its own does not work
            super().__init__(model=model, ref_model=ref_model, args=args, **kwargs)
        self.check_models(args.max_length)
        if args.disable_dropout:
            _stop_dropout(self.model)
        if args.pairs_per_step is not None:
            copies = copies_of_a_batch(self.accelerator.parallelism_config, self.model)
            args.gradient_accumulation_steps = args.accumulation(self.accelerator.num_processes // copies)
        if args.reference_cache is not None:
            self._leave_reference_model()
        if self._report:
            policy = self.accelerator.unwrap_model(self.model)
            self._report["loss"] = self._way_of_the_loss(policy, self._report["longest_sequence"])
            print(table(self._report), flush=True)
        self._recorder = Record(self.loss_options, self.train_dataset, self._report)
        self.add_callback(self._recorder)
        if args.samples:
            self.add_callback(Samples(self, args.samples))
        self._initialised = True

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card, and add the variant, alpha, beta, data, and the curves."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._recorder.add_to_card(self.args, self._kept())

    def _prepare_dataset(self, pairs: Pairs, processing_class: Any, args: Any, name: str) -> Pairs:
        made = prepared(super()._prepare_dataset, pairs, processing_class, args, name)
        if name == "train" and isinstance(made, Dataset) and args.process_index == 0:
            eos = getattr(processing_class, "tokenizer", processing_class).eos_token_id
            self._report = report(made, len(pairs), args.max_length, eos)
        return made

    # The loss.

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._computed = False
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._computed:
            raise _other_trl("DPOTrainer.compute_loss did not call _compute_loss, where the TDPO loss is")
        return result

    def _compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False):
        self._computed = True
        weight = self.router_aux_loss_coef if getattr(self, "aux_loss_enabled", False) else 0.0
        loss = self.tdpo_loss(model, inputs, aux_weight=weight)
        return (loss, {"loss": loss}) if return_outputs else loss

    def reference_side(self, model: nn.Module, policy: nn.Module, inputs: Batch, pairs: Batch) -> Reference:
        if "ref_hidden" in pairs:
            return Reference(pairs["ref_hidden"], self._ref_head)
        if self.ref_model is None and self.args.reference_cache is not None:
            raise CacheError("the batch has no ref_hidden: wanted the trainer's own data_collator, or one within it")
        return super().reference_side(model, policy, inputs, pairs)

    # The reference cache.

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """`DPOTrainer`'s hook for what it computes of the reference beforehand: here hidden states, not sums."""
        if is_attached(dataset):
            return dataset
        cache = self._cache_of(dataset, name, batch_size)
        if not isinstance(self.data_collator, CachedCollator):
            self.data_collator = CachedCollator(self.data_collator, self._caches)
        self._caches[str(cache.directory)] = cache
        if self._ref_head is None and cache.meta.head is not None:
            self._ref_head = on_device(cache.head(), self.accelerator.device)
        return attach(dataset, cache)

    def _cache_of(self, dataset: Dataset, name: str, batch_size: int) -> ReferenceCache:
        _check_cacheable(dataset)
        if self._ref_model_left:
            raise CacheError(
                "eval_dataset: got one without a cache once ref_model is gone, wanted it at initialisation"
            )
        collator = self.data_collator
        collate = collator.collate if isinstance(collator, CachedCollator) else collator
        parts = self._fingerprint(dataset, collate)
        if self._initialised:  # a dataset given to evaluate(): its name says nothing
            name = f"{name}-{fingerprint.of_strings(map(str, sorted(parts.items())))[:12]}"
        source = Source(dataset, collate, self._reference_beforehand(), parts)
        directory = Path(self.args.reference_cache) / name
        quiet = self.args.disable_tqdm
        return write_cache(directory, source, self.accelerator, batch_size=batch_size, quiet=quiet)

    def _reference_beforehand(self) -> Callable[[Batch], Reference]:
        """The reference's side of a batch before training has begun, when the policy is still what it was."""
        own = self._own_reference  # some versions of TRL load one by its name all the same
        model = self.model if own else self.accelerator.unwrap_model(self.ref_model)
        under_adapter = own and is_peft_model(model)
        self.check_models()  # before it is written
        side = reference.from_adapter if under_adapter else reference.from_model

        def side_of(batch: Batch) -> Reference:
            if own and not under_adapter and self.state.global_step:
                raise CacheError(
                    "eval_dataset: got one without a cache once training has begun, wanted it at initialisation, or a "
                    "ref_model: the reference was the model that is trained now"
                )
            if own and self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
                raise CacheError(
                    "reference_cache: is incomplete under FSDP or DeepSpeed; wanted it written beforehand, by "
                    "`tdpo cache` with the same arguments in one process, or under DDP"
                )
            with self.accelerator.autocast():
                return side(model if own else self.ref_model, model, batch)

        return side_of

    def _fingerprint(self, dataset: Dataset, collate: Callable[[list[dict]], Batch]) -> dict[str, str]:
        """The main process's, for all: under FSDP the others may have no weights yet."""
        shared = [self._own_fingerprint(dataset, collate) if self.accelerator.is_main_process else None]
        broadcast_object_list(shared, from_process=0)
        return shared[0]

    def _own_fingerprint(self, dataset: Dataset, collate: Callable[[list[dict]], Batch]) -> dict[str, str]:
        args = self.args
        if self._model_digests is None:
            self._model_digests = _model_digests(self.model)
        return {
            "dataset": fingerprint.of_dataset(dataset),
            "truncation": f"max_length={args.max_length}, {args.truncation_mode}",
            **self._model_digests,
            "precision": f"mixed precision {self.accelerator.mixed_precision}",
            "tokenizer": fingerprint.of_tokenizer(getattr(self.processing_class, "tokenizer", self.processing_class)),
            "template": fingerprint.of_strings([str(getattr(self.processing_class, "chat_template", None))]),
            "collator": fingerprint.of_layout(collate, dataset),
        }

    def _leave_reference_model(self) -> None:
        """Let go of the reference model once a cache has its states on disk and its head here."""
        if not self._caches:
            raise _other_trl("DPOTrainer did not call _precompute_ref_logps, where the reference cache is written")
        self._ref_model_left = self.ref_model is not None and not self._own_reference
        self.ref_model = None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in COLUMNS if name not in self._signature_columns]


def _initial(model: str | nn.Module) -> nn.Module | None:
    """Return the reference that a model is to itself before it is trained, None where an adapter or TRL sees to that.

    TRL loads one anew by its name: also that of a model which is given, whatever was done to it since.
    """
    if isinstance(model, str) or is_peft_model(model):
        return None
    if any(hasattr(x, "ds_id") or hasattr(x, "full_tensor") for x in model.parameters()):
        raise ValueError(
            "ref_model: got None for a model that is split over processes, wanted a second one of its kind"
        )
    return copy.deepcopy(model).requires_grad_(False)


def _stop_dropout(model: nn.Module) -> None:
    """Set to 0 the probabilities that a family's forward reads from itself or its config, which TRL leaves on."""
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)


def _model_digests(model: nn.Module) -> dict[str, str]:
    return {"model": fingerprint.of_model(model), "config": fingerprint.of_config(model)}


def _output_dir(model: str | PreTrainedModel) -> str:
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    return f"{name.rstrip('/').split('/')[-1] or 'model'}-TDPO"


def _check_arguments(args: TDPOConfig, kwargs: dict[str, Any]) -> None:
    if not isinstance(args, TDPOConfig):
        raise TypeError(f"args: got a {type(args).__name__}, wanted a TDPOConfig")
    refuse_functions_of_logits(kwargs)
    if args.reference_cache is not None:
        for _, dataset in datasets_of(kwargs):
            _check_cacheable(dataset)


def _check_cacheable(dataset: object) -> None:
    if isinstance(dataset, IterableDataset):
        raise CacheError(
            "reference_cache: got a streaming dataset, wanted one with a length: pairs are found again by their number"
        )


def _other_trl(what: str) -> RuntimeError:
    return RuntimeError(f"trl {trl.__version__}: {what}; wanted a version that does, see python/tdpo_trainer/README.md")
