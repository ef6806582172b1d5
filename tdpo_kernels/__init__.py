"""Compute TDPO from hidden states and LM-head weights, without ``[tokens, vocabulary]``. Start at `fused_tdpo_loss`."""

from .api import TDPOLoss, fused_tdpo_loss
from .op import token_stats
from .types import LMHead, TDPOOutput, TokenStats
from .version import __version__ as __version__

__all__ = ["LMHead", "TDPOLoss", "TDPOOutput", "TokenStats", "fused_tdpo_loss", "token_stats"]
