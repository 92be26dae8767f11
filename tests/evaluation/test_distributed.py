"""Two processes with half the batch each learn what one process learns from the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tiny_model import people, tiny_model

HEIGHT, WIDTH = 64, 96
PEOPLE = [5, 0, 1, 2]  # unequal halves, and an image without people


def whole_batch() -> tuple[Tensor, list[dict[str, Tensor]]]:
    pixels = torch.randn(len(PEOPLE), 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return pixels, [people(count, HEIGHT, WIDTH, seed=i) for i, count in enumerate(PEOPLE)]


def step(model: torch.nn.Module, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of some images of the batch."""
    pixels, labels = whole_batch()
    loss = model(pixels[part], None, labels[part]).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for checkpointing in (False, True):
        model = tiny_model().double()
        if checkpointing:
            model.gradient_checkpointing_enable()
        parallel = DistributedDataParallel(model, find_unused_parameters=False)
        loss, gradients = step(parallel, slice(2 * rank, 2 * rank + 2))
        gradients = {name.removeprefix("module."): gradient for name, gradient in gradients.items()}
        torch.save({"loss": loss, **gradients}, Path(folder) / f"{checkpointing}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two real processes computed."""
    path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(worker, (str(path),), nprocs=2)
    return path


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_processes_equal_one(folder: Path, checkpointing: bool) -> None:
    model = tiny_model().double()
    loss, gradients = step(model, slice(None))
    halves = [torch.load(folder / f"{checkpointing}-{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close((halves[0]["loss"] + halves[1]["loss"]) / 2, loss, rtol=1e-10, atol=0)
    for name, gradient in gradients.items():
        assert torch.equal(halves[0][name], halves[1][name]), name
        largest = gradient.abs().max().item()
        torch.testing.assert_close(halves[0][name], gradient, rtol=0, atol=1e-10 * largest, msg=name)
