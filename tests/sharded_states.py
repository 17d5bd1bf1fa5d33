"""A launcher runs this in several processes (test_processes.py): a sharded decoder gives what a whole one gives."""

from __future__ import annotations

import copy
import os

import torch
from tiny_lm import gpt2, llama
from torch.distributed.tensor import DTensor

from recbole_llm import processes
from recbole_llm.backbone.checkpointing import checkpoint_layers
from recbole_llm.backbone.soft_tokens import SoftPromptDecoder
from recbole_llm.schema import properties_dir, read_yaml
from recbole_llm.training.sharding import shard

SETTINGS = dict(read_yaml(properties_dir() / "training.yaml")) | {"enable_amp": False, "enable_scaler": False}


def states(decoder: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """States at two places of two prompts, and a gradient of the soft tokens; the second time round."""
    reader = SoftPromptDecoder(decoder, decoder.get_input_embeddings(), [5, 6, 7])
    ids = torch.tensor([[-1, 5, -2, 7], [8, -3, 9, 4]])
    for _ in range(2):
        soft = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        found = reader.states(ids, soft, torch.tensor([[2, 3], [1, 3]]))
        found.square().sum().backward()
    return found.detach(), soft.grad


def main() -> None:
    device = processes.join(cpu=True)
    for make in (llama, gpt2):
        for dtype in (torch.float32, torch.bfloat16):
            whole = make().to(dtype)
            decoder = copy.deepcopy(whole)
            checkpoint_layers(decoder)
            shard(SETTINGS | {"device": device}, decoder)
            # The last normalisation's few numbers stay gathered once they have been read.
            layers = {name: weight for name, weight in decoder.named_parameters() if name.startswith(("layers.", "h."))}
            assert layers
            for name, weight in layers.items():
                held = weight.to_local() if isinstance(weight, DTensor) else getattr(weight, "ds_tensor", weight)
                assert held.numel() <= -(-getattr(weight, "ds_numel", weight.numel()) // 2), f"{name} is not sharded"
            buffers = dict(whole.named_buffers())
            assert all(torch.equal(buffer, buffers[name]) for name, buffer in decoder.named_buffers())
            for ours, plain in zip(states(decoder), states(whole), strict=True):
                torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    print(f"process {os.environ['RANK']}: as the whole", flush=True)
    processes.leave()


if __name__ == "__main__":
    main()
