"""Triton's batch norm and activation: in the interpreter here, by the same checks on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from implementations import DTYPES, INTERPRETED
from test_norm_act import ACTIVATIONS, LAYOUTS, SHAPES, Case, arrange, check

from pygan.errors import UserError
from pygan.functional import norm_act

interpreted = [
    pytest.mark.triton,
    pytest.mark.skipif(not INTERPRETED, reason="runs where TRITON_INTERPRET=1"),
]


@pytest.fixture(params=["one launch", "blocks of rows"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Tiles so small that each loop of the kernels turns several times."""
    from pygan.kernels import norm_act as kernels

    monkeypatch.setattr(kernels, "TILE", 256)
    if request.param == "blocks of rows":
        monkeypatch.setattr(kernels, "PROGRAMS", 8)
        monkeypatch.setattr(kernels, "LONGEST", 2)
        monkeypatch.setattr(kernels, "WHOLE_ROWS", 8)
        monkeypatch.setattr(kernels, "WHOLE_ROWS_OF_MANY", 8)
    yield request.param


CASES = [
    Case((6, 21, 15, 6), groups=3),
    Case((6, 21, 15, 6), layout="channels_last", groups=2, activation="leaky_relu"),
    Case((6, 21, 15, 6), layout="strided", activation="tanh", affine=False),
    Case((6, 21, 5, 6), layout="channels_last", activation="sigmoid", training=False),
    Case((6, 5, 9, 7), groups=6, activation="none", tracked=False),
    Case((6, 70, 3, 3), layout="channels_last", groups=6, tracked=False, affine=False),
    Case((1, 20, 4, 9), activation="tanh", training=False),
    Case((40, 33), groups=2),
    Case((4, 5, 11), layout="strided"),
    Case((2, 7, 3, 4, 5), layout="channels_last"),
    Case((6, 3, 4, 4), layout="channels_last", offset=3000.0),
    # Instance norms: a group for each image.
    Case((5, 21, 6, 7), groups=5, averaged=True),
    Case((7, 40, 2, 2), groups=7, averaged=True, layout="channels_last", activation="leaky_relu"),
    Case((5, 3, 17, 19), groups=5, layout="channels_last", tracked=False, activation="tanh"),
    Case((1, 9, 6, 5), groups=1, averaged=True),
    Case((5, 21, 6, 7), groups=5, averaged=True, training=False),
]


class TestInterpreted:
    pytestmark = interpreted

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case.shape)))
    def test_against_torch(self, case: Case, dtype: torch.dtype, small_tiles: str) -> None:
        check(Case(**{**vars(case), "dtype": dtype}), impl="triton")

    def test_grad_of_grad(self) -> None:
        check(Case((6, 9, 5, 4), layout="channels_last", groups=2), second=True, impl="triton")

    def test_given_statistics(self, small_tiles: str) -> None:
        x = arrange(torch.randn(4, 19, 6, 5) * 3 + 1, "channels_last").requires_grad_()
        groups = x.detach().view(2, 2, 19, 6, 5).transpose(1, 2).flatten(2).double()
        given = torch.stack([groups.mean(2), (groups.var(2, correction=0) + 1e-5).rsqrt()]).float()
        weight, mean, var = torch.rand(19), torch.zeros(19), torch.ones(19)
        keywords = {"training": True, "groups": 2, "impl": "triton"}
        taken = norm_act_given(x, mean, var, weight, given, **keywords)
        assert torch.equal(mean, torch.zeros(19)) and torch.equal(var, torch.ones(19))
        computed = norm_act(x, mean, var, weight, **keywords)
        torch.testing.assert_close(taken, computed, rtol=1e-5, atol=1e-5)
        for y in (taken, computed):
            y.square().sum().backward()
        half = torch.autograd.grad(norm_act(x, None, None, weight, **keywords).square().sum(), x)
        torch.testing.assert_close(x.grad, 2 * half[0], rtol=1e-4, atol=1e-4)

    def test_what_it_does_not_take(self) -> None:
        with pytest.raises(UserError, match="float64"):
            norm_act(torch.randn(4, 5, 3, 3).double(), None, None, training=True, impl="triton")
        with pytest.raises(UserError, match="0 values"):
            norm_act(torch.randn(0, 5, 3, 3), torch.zeros(5), torch.ones(5), impl="triton")
        with pytest.raises(UserError, match="on meta"):
            weight = torch.ones(5, device="meta")
            norm_act(torch.randn(4, 5, 3, 3), None, None, weight, training=True, impl="triton")


def norm_act_given(
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    given: torch.Tensor,
    **keywords: object,
) -> torch.Tensor:
    from pygan.ops.norm_act import KERNELS, Settings, _NormAct

    settings = Settings(True, 0.1, 1e-5, "relu", 0.2, 2)
    result: torch.Tensor = _NormAct.apply(
        x, weight, None, mean, var, settings, given, KERNELS["triton"]
    )
    return result


GPU_SHAPES = [*(s for s in SHAPES if s[0] % 2 == 0), (64, 128, 64, 64), (256, 512, 4, 4)]


class TestOnAGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_shapes(
        self, shape: tuple[int, ...], groups: int, layout: str, dtype: torch.dtype, training: bool
    ) -> None:
        if shape[0] // groups * torch.Size(shape[2:]).numel() < 3:
            pytest.skip("two values are normalised to rounding noise")
        check(
            Case(shape, dtype, layout, groups, "leaky_relu", training, device="cuda"),
            impl="triton",
        )

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, activation: str) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            case = Case((32, 64, 16, 16), dtype, "channels_last", 2, activation, device="cuda")
            check(case, impl="triton")

    def test_instance_norm(self) -> None:
        for layout in LAYOUTS[:2]:
            case = Case((70, 48, 33, 32), groups=70, tracked=False, layout=layout, device="cuda")
            check(case, impl="triton")

    def test_two_runs_give_the_same_bits(self) -> None:
        x = torch.randn(128, 64, 32, 32, device="cuda").to(memory_format=torch.channels_last)
        first, second = (norm_act(x, None, None, training=True, impl="triton") for _ in range(2))
        assert torch.equal(first, second)
