"""One training step: whom it waits for, what it keeps, and in which precision it counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hpetr.model import attention, matching
from hpetr.model.ops.reference import deformable_sampling_reference
from tiny_model import TINY_SWIN, people, tiny_model

SIZE = (64, 96)  # height, width


def padded_batch() -> tuple[Tensor, Tensor]:
    """Two images, the second padded at the right."""
    pixels = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, *SIZE, dtype=torch.long)
    mask[1, :, 80:] = 0
    return pixels, mask


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            found[name] = parameter.grad.clone()
    return found


class BlockingCopies(TorchFunctionMode):
    """Copies from the host that the device's queue has to be empty for."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == "meta":
            made = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
            moved = func is Tensor.to and args[0].device.type == "cpu" and not (kwargs or {}).get("non_blocking")
            if made or moved:
                self.found.append(f"{func.__name__} {tuple(result.shape)}")
        return result


@pytest.mark.parametrize("labels_on", ["cpu", "meta"])
def test_the_matching_costs_are_the_only_thing_waited_for(monkeypatch, labels_on: str) -> None:
    """The meta device has no numbers: whatever looks at one, as `item`, `nonzero` or a boolean index do, raises."""
    copies = []

    class Copy:
        def __init__(self, tensor: Tensor):
            assert tensor.device.type == "meta"
            copies.append(tensor.shape)

        def wait(self) -> np.ndarray:
            return np.random.default_rng(0).random(copies[-1], dtype=np.float32)

    monkeypatch.setattr(matching, "HostCopy", Copy)
    model = tiny_model(dropout=0.1).to("meta")
    pixels, mask = (tensor.to("meta") for tensor in padded_batch())
    labels = [people(3, *SIZE, seed=0), people(2, *SIZE, seed=1)]
    labels[0]["ignore_boxes"] = torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    labels[1]["ignore_boxes"] = torch.zeros(0, 4)
    labels = [{name: value.to(labels_on) for name, value in label.items()} for label in labels]
    with BlockingCopies() as blocking:
        output = model(pixels, mask, labels)
        output.loss.backward()
    assert len(copies) == 1
    assert not blocking.found
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name


def test_reading_a_number_would_be_noticed() -> None:
    """What the test above rests on."""
    numbers = torch.ones(3, device="meta")
    for look in (lambda: numbers.sum().item(), lambda: numbers.nonzero(), lambda: numbers[numbers > 0], numbers.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            look()
    with BlockingCopies() as blocking:
        torch.tensor([1.0, 2.0], device="meta")
        numbers.new_tensor(3)
        torch.ones(2).to("meta")
    assert len(blocking.found) == 3


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1, "deformable_dropout": 0.1}, {"backbone_config": TINY_SWIN}])
def test_gradient_checkpointing_changes_nothing(options: dict) -> None:
    """Same loss and gradients to the last bit, also with dropout; and far fewer tensors kept."""
    pixels, mask = padded_batch()
    labels = [people(3, *SIZE, seed=0), people(0, *SIZE, seed=1)]
    results, kept = [], []
    for checkpointing in (False, True):
        model = tiny_model(**options)
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(pixels, mask, labels).loss
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
        kept.append(sum(sizes))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    assert kept[1] < 0.6 * kept[0]


def test_gradient_checkpointing_can_be_taken_back() -> None:
    model = tiny_model()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_autocast_computes_coordinates_and_losses_in_float32(monkeypatch) -> None:
    """References, locations, scores, costs and losses keep float32; the terms are float32's within some per cent."""
    pixels, mask = padded_batch()
    labels = [people(3, *SIZE, seed=0), people(2, *SIZE, seed=1)]
    seen = []

    def watch(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
        seen.append((value.dtype, locations.dtype, weights.dtype))
        return deformable_sampling_reference(value, shapes, locations, weights)

    class Fixed(matching.PendingAssignments):
        """The first queries, whatever they cost: a match that flips moves a term by more than rounding does."""

        def solve(self) -> list[np.ndarray]:
            assert self.copy.tensor.dtype == torch.float32
            self.copy.tensor = torch.cat(
                [torch.arange(float(s[1])).outer(torch.arange(float(s[2]))).expand(s).flatten() for s in self.shapes]
            )
            return super().solve()

    monkeypatch.setattr("hpetr.model.losses.PendingAssignments", Fixed)
    model = tiny_model()
    torch.nn.init.zeros_(model.pose_decoder.class_heads[-1].weight)  # a rank that flips would give other references
    exact = model(pixels, mask, labels)
    monkeypatch.setattr(attention, "deformable_sampling", watch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixels, mask, labels)
    output.loss.backward()
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}
    for tensor in (output.keypoints, output.logits, output.proposal_logits, output.loss, *output.loss_dict.values()):
        assert tensor.dtype == torch.float32
    for name, term in exact.loss_dict.items():
        assert output.loss_dict[name].item() == pytest.approx(term.item(), rel=0.05), name
    gradients(model)


def test_model_in_bfloat16_gives_float32_coordinates() -> None:
    pixels, mask = padded_batch()
    model = tiny_model().eval().to(torch.bfloat16)
    with torch.inference_mode():
        output = model(pixels.to(torch.bfloat16), mask)
    assert output.poses.dtype == torch.float32
    assert torch.isfinite(output.poses).all()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("counts", "size"), [([0, 0], SIZE), ([0, 3], SIZE), ([1, 2], (32, 32))], ids=["nobody", "somebody", "few tokens"]
)
def test_every_parameter_gets_a_gradient(precision: torch.dtype, counts: list[int], size: tuple[int, int]) -> None:
    """A parameter without one stops DistributedDataParallel. 32 x 32 pixels are 22 tokens for 45 queries."""
    model = tiny_model()
    labels = [people(count, *size, seed=i) for i, count in enumerate(counts)]
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        loss = model(pixels, None, labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    gradients(model)
