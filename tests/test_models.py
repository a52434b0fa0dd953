from __future__ import annotations

import pytest
import torch

from pygan.errors import UserError
from pygan.models import dcgan


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(size: int, channels: int) -> None:
    generator, discriminator = dcgan(size, channels, nz=7, ngf=2, ndf=2)
    z = torch.randn(2, 7, 1, 1)
    images = generator(z)
    assert images.shape == (2, channels, size, size)
    assert images.abs().max() <= 1.0
    assert discriminator(images).shape == (2,)
    assert torch.equal(generator(z.flatten(1)), images)


def test_names_of_the_well_known_example() -> None:
    generator, discriminator = dcgan()
    layers = {0: (100, 512), 3: (512, 256), 6: (256, 128), 9: (128, 64), 12: (64, 3)}
    state = generator.state_dict()
    for index, (before, after) in layers.items():
        assert state[f"main.{index}.weight"].shape == (before, after, 4, 4)
    norms = {f"main.{i}" for i in (1, 4, 7, 10)}
    fields = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"main.{i}.weight" for i in layers} | {f"{n}.{f}" for n in norms for f in fields}
    assert set(state) == expected
    state = discriminator.state_dict()
    layers = {0: (3, 64), 2: (64, 128), 5: (128, 256), 8: (256, 512), 11: (512, 1)}
    for index, (before, after) in layers.items():
        assert state[f"main.{index}.weight"].shape == (after, before, 4, 4)
    norms = {f"main.{i}" for i in (3, 6, 9)}
    expected = {f"main.{i}.weight" for i in layers} | {f"{n}.{f}" for n in norms for f in fields}
    assert set(state) == expected


def test_initialisation() -> None:
    torch.manual_seed(0)
    generator, _ = dcgan()
    state = generator.state_dict()
    assert state["main.3.weight"].std().item() == pytest.approx(0.02, rel=0.01)
    assert state["main.1.weight"].mean().item() == pytest.approx(1.0, abs=0.005)
    assert state["main.1.weight"].std().item() == pytest.approx(0.02, rel=0.15)
    assert not state["main.1.bias"].any()


@pytest.mark.parametrize("arguments", [{"image_size": 48}, {"channels": 0}, {"nz": -1}])
def test_sizes_outside_are_named(arguments: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        dcgan(**arguments)
