"""From logits to a token id: penalties, filters and a reproducible draw."""

from numoe.engine.sampling.logits import HostLogits, Shortlist, StepLogits
from numoe.engine.sampling.params import check_sampling
from numoe.engine.sampling.sampler import SampledToken, Sampler

__all__ = ["HostLogits", "SampledToken", "Sampler", "Shortlist", "StepLogits", "check_sampling"]
