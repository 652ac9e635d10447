"""Weights cast together against autocast, which casts each by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from effdet.training.flat import cast_together


class Net(nn.Module):
    """A convolution that runs twice, a frozen one, one that does not run, and layers that stay in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.frozen = nn.Conv2d(4, 4, 3).requires_grad_(False)
        self.unused = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.norm(self.first(x))).relu())
        return self.head(self.frozen(x).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_those_of_autocast(dtype):
    images, results = torch.randn(2, 3, 6, 8), []
    for together in (False, True):
        net = Net()
        with torch.autocast("cpu", dtype):
            if together:
                with cast_together(net, dtype):
                    assert net.first.weight.dtype == dtype and net.norm.weight.dtype == torch.float32
                    output = net(images)
            else:
                output = net(images)
        output.float().square().sum().backward()
        results.append((output, net))
    assert results[0][0].dtype == dtype and torch.equal(results[0][0], results[1][0])
    for (name, one), other in zip(results[0][1].named_parameters(), results[1][1].parameters(), strict=True):
        if name.startswith("unused"):
            assert one.grad is None and not other.grad.any()
        elif one.requires_grad:
            assert other.grad.dtype == torch.float32 and torch.equal(one.grad, other.grad), name
        else:
            assert other.grad is None


def test_parameters_stay_what_they_were_also_after_an_error():
    net = Net()
    names, state = [name for name, _ in net.named_parameters()], {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="broken off"), cast_together(net, torch.bfloat16):
        assert [name for name, _ in net.named_parameters()] == names
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        raise RuntimeError("broken off")
    assert net.first.weight is dict(net.named_parameters())["first.weight"]
    assert isinstance(net.head.bias, nn.Parameter)
