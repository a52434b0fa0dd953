"""Reference networks: plain torch modules, fused only when asked."""

from pygan.models.dcgan import Discriminator, Generator, dcgan, init_weights

__all__ = ["Discriminator", "Generator", "dcgan", "init_weights"]
