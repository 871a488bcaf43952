"""Plans: everything about a run before it runs, from the lowering that the runtime executes."""

from megatree.parallel.plan.device import A100_SXM, DEVICES, H100_SXM, Device
from megatree.parallel.plan.diff import Change, differences
from megatree.parallel.plan.estimate import Estimate, estimate
from megatree.parallel.plan.plan import Plan, PlannedCollective, StagePlan, plan

__all__ = [
    "A100_SXM",
    "DEVICES",
    "H100_SXM",
    "Change",
    "Device",
    "Estimate",
    "Plan",
    "PlannedCollective",
    "StagePlan",
    "differences",
    "estimate",
    "plan",
]
