"""Laws of lib/muon.py: a step is the momentum made orthogonal, the same for a matrix among others and alone, and goes
on after a stop."""

import pytest
import torch
import torch.nn as nn

from lib.muon import Muon, orthogonal
from lib.optim import make_optimizers, parameter_groups

SHAPES = [(16, 16), (48, 16), (16, 48), (128, 384), (1, 20), (20, 1), (3, 64)]


def with_spectrum(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    u = torch.linalg.qr(torch.randn(rows, n, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, n, generator=generator))[0]
    return u @ torch.diag(values) @ v.T


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_come_near_one_and_directions_stay(rows, columns, scale):
    """Those that are up to a hundred times smaller than the largest."""
    n = min(rows, columns)
    x = with_spectrum(rows, columns, torch.logspace(0, -2, n)) * scale
    y = orthogonal(x[None])[0]
    assert y.shape == x.shape
    values = torch.linalg.svdvals(y)
    assert 0.68 <= values.min() and values.max() <= 1.25
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    turned = u.T @ y.double() @ v.T  # diagonal where no direction was turned
    assert (turned - turned.diagonal().diag()).abs().max() < 0.02


@pytest.mark.parametrize("rows, columns", [(48, 16), (16, 48), (128, 384), (384, 128)])
def test_random_matrices_become_orthogonal(rows, columns):
    x = torch.randn(8, rows, columns, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal(x))
    assert 0.68 <= values.min() and values.max() <= 1.25


def test_many_at_once_are_each_alone():
    x = torch.randn(5, 24, 16, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 5)[:, None, None]
    torch.testing.assert_close(orthogonal(x), torch.cat([orthogonal(one[None]) for one in x]), atol=1e-5, rtol=1e-4)


def test_nothing_to_go_by_is_no_step():
    assert not orthogonal(torch.zeros(2, 4, 6)).any()


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """As published (Jordan et al. 2024), a matrix at a time."""
    x = x / (x.norm() + 1e-7)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(5):
        a = wide @ wide.T
        wide = 3.4445 * wide + (-4.775 * a + 2.0315 * a @ a) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


def test_steps_are_those_by_hand():
    """Three of them: Nesterov's average, decay by the plain rate, a tall matrix further than a wide one."""
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (24, 8)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected, averages = [p.detach().clone() for p in parameters], [torch.zeros(shape) for shape in shapes]
    muon = Muon([{"params": parameters}], lr=0.1, weight_decay=0.3, momentum=0.9)
    for _ in range(3):
        for k, (p, (rows, columns)) in enumerate(zip(parameters, shapes, strict=True)):
            p.grad = torch.randn(rows, columns)
            averages[k] = 0.9 * averages[k] + 0.1 * p.grad
            direction = 0.1 * p.grad + 0.9 * averages[k]
            rate = 0.1 * max(1, rows / columns) ** 0.5
            expected[k] = expected[k] * (1 - 0.1 * 0.3) - rate * newton_schulz(direction)
        muon.step()
    for p, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), wanted, atol=1e-5, rtol=1e-4)


def test_a_matrix_without_a_gradient_stays_as_it_is():
    still, moving = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moving.grad = torch.eye(4)
    Muon([{"params": [still, moving]}], weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(4, 4)) and not torch.equal(moving, torch.ones(4, 4))


def test_its_state_goes_through_a_file(tmp_path):
    """Two steps, a stop, and two more are four, to the last bit."""

    def gradients(model, step):
        for k, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + k))

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
        return model, make_optimizers(parameter_groups(model, 0.1, 1e-3, 0.02))

    straight, optimizers = make()
    stopped, before = make()
    for step in range(4):
        for model, group in ((straight, optimizers), (stopped, before)):
            gradients(model, step)
            for optimizer in group:
                optimizer.step()
        if step == 1:
            torch.save([stopped.state_dict(), [o.state_dict() for o in before]], tmp_path / "state.pt")
            weights, states = torch.load(tmp_path / "state.pt", weights_only=True)
            stopped, before = make()
            stopped.load_state_dict(weights)
            for optimizer, state in zip(before, states, strict=True):
                optimizer.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), stopped.parameters(), strict=True))


def test_matrices_go_to_muon_and_words_norms_and_biases_to_adam():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens, self.lm_head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.inner, self.norm, self.conv = nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv2d(3, 8, 2)

    model = Words()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1, 1e-3, 0.02)
    by = {kind: {names[id(p)] for g in groups for p in g["params"] if g["muon"] == kind} for kind in (True, False)}
    assert by[True] == {"inner.weight"} and by[True] | by[False] == set(names.values())
    kept = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert kept == {"inner.bias", "norm.weight", "norm.bias", "conv.bias"}
    adam, muon = make_optimizers(groups)
    assert isinstance(adam, torch.optim.AdamW) and isinstance(muon, Muon)
    assert {group["initial_lr"] for group in muon.param_groups} == {0.02}
    assert not any(group["muon"] for group in parameter_groups(model, 0.1, 1e-3))
