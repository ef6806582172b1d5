"""Compute on several devices, where a vocabulary, a sequence or a batch lies split over a process group's ranks."""

from ..types import VocabParallelHead
from .heads import vocab_parallel
from .pairs import mean_over_ranks
from .sequences import sequence_parallel_loss

__all__ = ["VocabParallelHead", "mean_over_ranks", "sequence_parallel_loss", "vocab_parallel"]
