"""Mixtures of experts: feed-forward layers of which a router picks a few for each token."""

from megavlm.models.moe.config import MoEConfig
from megavlm.models.moe.health import RouterObserver
from megavlm.models.moe.router import Router, Routing
from megavlm.models.moe.spec import moe_spec

__all__ = ["MoEConfig", "Router", "RouterObserver", "Routing", "moe_spec"]
