"""GANs as people write them, from the tables of the papers, with few channels."""
