"""From logits to a token id: penalties, filters and a reproducible draw."""

from numoe.engine.sampling.params import check_sampling
from numoe.engine.sampling.sampler import SampledToken, Sampler

__all__ = ["SampledToken", "Sampler", "check_sampling"]
