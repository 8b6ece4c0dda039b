"""The demo model: a small dense model, sparsely upcycled into a Mixture of Experts."""

from numoe.deploy.demo.model import demo_model

__all__ = ["demo_model"]
