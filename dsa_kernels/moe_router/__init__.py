"""moe_router: top-k routing of tokens to experts, and the map from its ids to expert-major rows."""

from __future__ import annotations

from .routing_map import RoutingMap, routing_map

__all__ = ["RoutingMap", "routing_map"]
