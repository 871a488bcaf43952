"""Plans: everything about a run before it runs, from the lowering that the runtime executes."""

from megatree.parallel.plan.device import H100_SXM, Device
from megatree.parallel.plan.estimate import Estimate, estimate
from megatree.parallel.plan.plan import Plan, PlannedCollective, StagePlan, plan

__all__ = [
    "H100_SXM",
    "Device",
    "Estimate",
    "Plan",
    "PlannedCollective",
    "StagePlan",
    "estimate",
    "plan",
]
