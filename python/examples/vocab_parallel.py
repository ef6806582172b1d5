"""TDPO with the vocabulary, the sequences and the pairs split over ranks: what to copy is `step`.

    torchrun --nproc-per-node 4 python/examples/vocab_parallel.py --vocabulary 2 --sequence 2
    torchrun --nproc-per-node 8 python/examples/vocab_parallel.py --vocabulary 2 --sequence 2   # the rest splits pairs

Runs as it is, on CPUs or one GPU a rank: a tiny Llama with random weights and random pairs. Losses are those of one
process, but for rounding. Each rank of a vocabulary has the whole backbone and its rows of the head; each rank of a
sequence runs the whole backbone, and gives the head its own tokens.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tdpo_trainer.head import last_hidden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from tdpo_kernels import TDPOOutput, token_stats
from tdpo_kernels.parallel import VocabParallelHead, mean_over_ranks, sequence_parallel_loss, vocab_parallel

PAIRS, LENGTH, PROMPT, VOCABULARY = 8, 24, 6, 251


@dataclass(frozen=True, eq=False)
class Side:
    """A model without its head, and this rank's rows of that."""

    backbone: nn.Module
    head: VocabParallelHead

    def parameters(self) -> list[nn.Parameter]:
        return [self.head.weight, *self.backbone.parameters()]


def step(policy: Side, reference: Side, input_ids: Tensor, labels: Tensor, mesh: DeviceMesh, **options) -> TDPOOutput:
    """Loss and gradients of this rank's pairs, chosen first: ``.grad`` is that of the mean over all ranks' pairs."""
    data, sequence = mesh.get_group("data"), mesh.get_group("sequence")
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)  # before they are split: the next token may lie elsewhere
    mine = slice(*(LENGTH * (dist.get_rank(sequence) + end) // dist.get_world_size(sequence) for end in (0, 1)))
    ids = torch.arange(len(labels), device=labels.device)[:, None].expand(-1, LENGTH)
    with torch.no_grad():
        theirs = last_hidden(reference.backbone, input_ids=input_ids)[:, mine]
    ours = last_hidden(policy.backbone, input_ids=input_ids)[:, mine]
    stats = token_stats(ours, policy.head, theirs, reference.head, shifted[:, mine], shift=False)
    out = sequence_parallel_loss(stats, ids[:, mine], len(labels) // 2, sequence, reduction="none", **options)
    mean_over_ranks(out.loss, data).backward()
    for x in policy.parameters():
        if x.grad is not None:
            dist.all_reduce(x.grad, group=sequence)  # a sum over tokens
            dist.all_reduce(x.grad, group=data)  # a mean over ranks, see `mean_over_ranks`
            x.grad /= dist.get_world_size(data)
    return out


def side(model: LlamaForCausalLM, mesh: DeviceMesh) -> Side:
    """The model's head cut for this rank; as many rows each as it goes, the last ones fewer."""
    part = model.lm_head.weight.detach().chunk(mesh["vocabulary"].size())[mesh.get_local_rank("vocabulary")]
    return Side(model, vocab_parallel(nn.Parameter(part.clone()), mesh.get_group("vocabulary")))


def train(mesh: DeviceMesh, device: torch.device, steps: int, **options) -> Iterator[float]:
    """The mean loss of all pairs before each step."""
    torch.manual_seed(0)  # the same models and pairs on all ranks
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(device).eval()
    reference, policy = side(copy.deepcopy(model), mesh), side(model, mesh)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    input_ids = torch.randint(VOCABULARY, (2 * PAIRS, LENGTH)).to(device)
    labels = input_ids.clone()
    labels[:, :PROMPT] = -100
    pairs = torch.arange(PAIRS)[mesh.get_local_rank("data") :: mesh["data"].size()]
    rows = torch.cat([pairs, pairs + PAIRS])
    for _ in range(steps):
        optimizer.zero_grad()
        out = step(policy, reference, input_ids[rows], labels[rows], mesh, **options)
        loss = mean_over_ranks(out.loss.detach(), mesh.get_group("data"))
        dist.all_reduce(loss, group=mesh.get_group("data"))
        yield loss.item() / mesh["data"].size()
        optimizer.step()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=2, help="ranks that share a head; default: %(default)s")
    parser.add_argument("--sequence", type=int, default=1, help="ranks that share sequences; default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args(arguments)
    world, shared = int(os.environ.get("WORLD_SIZE", "0")), options.vocabulary * options.sequence
    if not world or world % shared or world // shared > PAIRS:
        parser.error(f"{world or 'no'} ranks: wanted a multiple of vocabulary x sequence = {shared}; start by torchrun")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    shape = (world // shared, options.sequence, options.vocabulary)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "sequence", "vocabulary"))
    for n, loss in enumerate(train(mesh, device, options.steps, beta=0.1, alpha=0.5), 1):
        if dist.get_rank() == 0:
            print(f"step {n}: loss {loss:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
