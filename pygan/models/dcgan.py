"""DCGAN (Radford, Metz, Chintala 2015, arXiv:1511.06434) for square images of 16 to 256 pixels.

Parameters are named as in the well-known example (``main.0.weight`` …), so weights travel both
ways. The discriminator returns logits: the sigmoid belongs to the loss, where it is stable.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pygan.errors import UserError

LEAKY_SLOPE = 0.2
D_NORMS = ("batch", "spectral", "none")


def _check_sizes(image_size: int, **counts: int) -> int:
    """Number of stride 2 layers between 4x4 and the image, or a UserError."""
    if image_size not in (16, 32, 64, 128, 256):
        raise UserError(
            f"image_size is {image_size}; DCGAN is defined for 16, 32, 64, 128 and 256 pixels, "
            "so choose one of these"
        )
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is {value}; give a whole number of at least 1")
    return image_size.bit_length() - 3


class Generator(nn.Module):
    """Latent vectors to images.

    ``z [N, nz]`` or ``[N, nz, 1, 1]`` -> ``[N, channels, image_size, image_size]`` in [-1, 1].
    A 4x4 map of ``ngf * image_size / 8`` channels is doubled in size, and halved in channels, by
    ConvTranspose2d(4, 2, 1) + BatchNorm2d + ReLU; the last layer ends in tanh.
    """

    def __init__(
        self, image_size: int = 64, channels: int = 3, nz: int = 100, ngf: int = 64
    ) -> None:
        super().__init__()
        levels = _check_sizes(image_size, channels=channels, nz=nz, ngf=ngf)
        self.nz = nz
        width = ngf << (levels - 1)
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(nz, width, 4, 1, 0, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        ]
        for _ in range(levels - 1):
            layers += [
                nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width // 2),
                nn.ReLU(True),
            ]
            width //= 2
        layers += [nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z if z.dim() == 4 else z[:, :, None, None])


class Discriminator(nn.Module):
    """Images to logits.

    ``x [N, channels, image_size, image_size]`` -> ``[N]``; ``sigmoid`` of it is D(x). Mirrors the
    generator with Conv2d(4, 2, 1) + BatchNorm2d + LeakyReLU(0.2); no norm on the first layer. Norm
    "spectral" (Miyato et al. 2018, arXiv:1802.05957) is of every weight, and with it or "none"
    convolutions have biases in place of batch norms.
    """

    def __init__(
        self, image_size: int = 64, channels: int = 3, ndf: int = 64, norm: str = "batch"
    ) -> None:
        super().__init__()
        levels = _check_sizes(image_size, channels=channels, ndf=ndf)
        if norm not in D_NORMS:
            raise UserError(f"D's norm is {norm!r}; it is one of {', '.join(D_NORMS)}")
        bias = norm != "batch"
        layers: list[nn.Module] = [
            nn.Conv2d(channels, ndf, 4, 2, 1, bias=bias),
            nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
        ]
        width = ndf
        for _ in range(levels - 1):
            layers += [nn.Conv2d(width, width * 2, 4, 2, 1, bias=bias)]
            layers += [nn.BatchNorm2d(width * 2)] if norm == "batch" else []
            layers += [nn.LeakyReLU(LEAKY_SLOPE, inplace=True)]
            width *= 2
        layers += [nn.Conv2d(width, 1, 4, 1, 0, bias=bias)]
        if norm == "spectral":
            layers = [spectral_norm(m) if isinstance(m, nn.Conv2d) else m for m in layers]
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).flatten()


def init_weights(module: nn.Module) -> None:
    """The usual start, for ``module.apply``: N(0, 0.02) for convolutions, N(1, 0.02) for batch
    norm scales, zero for their shifts (Radford et al. 2015, section 4)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def dcgan(
    image_size: int = 64,
    channels: int = 3,
    nz: int = 100,
    ngf: int = 64,
    ndf: int = 64,
    d_norm: str = "batch",
) -> tuple[Generator, Discriminator]:
    """A DCGAN generator and discriminator, initialised the usual way from torch's global seed.

    Args:
        image_size: height and width in pixels: 16, 32, 64, 128 or 256.
        channels: 1 for grey, 3 for colour.
        nz: length of the latent vector.
        ngf, ndf: channels of the widest map in G and D; each halving of the map doubles them.
        d_norm: of D: "batch", "spectral" or "none".

    Raises:
        UserError: a size outside these.
    """
    generator = Generator(image_size, channels, nz, ngf)
    discriminator = Discriminator(image_size, channels, ndf, d_norm)
    generator.apply(init_weights)
    discriminator.apply(init_weights)
    return generator, discriminator
