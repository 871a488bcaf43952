"""`estimate`: seconds and MFU of a planned step on a described machine."""

from dataclasses import dataclass

from megatree.parallel.plan.device import H100_SXM, Device
from megatree.parallel.plan.plan import Plan, PlannedCollective


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Where the time of a step goes, on the busiest rank.

    Args:
        step_s: seconds per step.
        products_s, attention_s, elementwise_s: compute of all microbatches.
        model_communication_s: collectives inside the model that compute does not hide.
        sync_s: gradient syncs that compute does not hide.
        bubble_s: idle time of the pipeline.
        optimizer_s: the update.
        tokens_per_s: of the whole job.
        mfu: model FLOPs over what the devices' datasheets promise.
    """

    step_s: float
    products_s: float
    attention_s: float
    elementwise_s: float
    model_communication_s: float
    sync_s: float
    bubble_s: float
    optimizer_s: float
    tokens_per_s: float
    mfu: float

    def __str__(self) -> str:
        parts = (
            ("products", self.products_s),
            ("attention", self.attention_s),
            ("elementwise", self.elementwise_s),
            ("model communication", self.model_communication_s),
            ("gradient sync", self.sync_s),
            ("bubble", self.bubble_s),
            ("optimizer", self.optimizer_s),
        )
        shares = ", ".join(f"{name} {100 * s / self.step_s:.0f}%" for name, s in parts if s > 0)
        return (
            f"{self.step_s:.3f} s a step, {self.tokens_per_s:,.0f} tokens/s, "
            f"MFU {100 * self.mfu:.1f}% ({shares})"
        )


def estimate(plan: Plan, device: Device = H100_SXM) -> Estimate:
    """Estimate the time of a step.

    Per rank: products and attention at their sustained rates, everything else by the bytes it
    moves, collectives by bytes over the slowest link that their group crosses plus a latency, the
    exposed part of each, all stretched by the pipeline's bubble; then the update by its bytes.

    Args:
        plan: of the run.
        device: of every rank.

    Returns:
        An Estimate.
    """
    stage = max(plan.stages, key=lambda s: s.flops)
    micro = plan.num_microbatches
    narrow = min(1.0, stage.narrowest_product / 4096)
    rate = device.product_rate * (
        device.product_rate_narrow + (1 - device.product_rate_narrow) * narrow
    )
    products = micro * (stage.flops - stage.attention_flops) / rate
    attention = micro * stage.attention_flops / device.attention_rate
    kept = stage.activation_bytes + stage.offloaded_bytes
    # The measured traffic is of a forward and a backward, about twice as much; again is a forward.
    written = stage.plain_bytes + max(0, stage.plain_bytes - kept) / 3
    elementwise = micro * written * device.elementwise_traffic / device.memory_bandwidth
    inside = sum(
        collective_seconds(c, plan, device) * c.count
        for c in plan.collectives
        if c.phase not in ("sync", "step") and c.unit != "weights"
    )
    sync = sum(
        collective_seconds(c, plan, device) * c.count
        for c in plan.collectives
        if c.phase == "sync" or c.unit == "weights"
    )
    model_communication = inside * device.exposed_model
    busy = products + attention + elementwise + model_communication
    bubble = busy * plan.bubble / (1 - plan.bubble)
    optimizer = (
        2 * (stage.parameter_bytes + stage.gradient_bytes + stage.optimizer_bytes)
    ) / device.memory_bandwidth
    exposed = max(sync * device.exposed_sync, sync - 0.5 * busy)
    step = busy + bubble + optimizer + exposed + device.step_overhead
    tokens = plan.tokens_per_step / step
    return Estimate(
        step_s=step,
        products_s=products,
        attention_s=attention,
        elementwise_s=elementwise,
        model_communication_s=model_communication,
        sync_s=exposed,
        bubble_s=bubble,
        optimizer_s=optimizer,
        tokens_per_s=tokens,
        mfu=tokens * plan.flops_per_token / (device.peak_flops * plan.num_ranks),
    )


def collective_seconds(c: PlannedCollective, plan: Plan, device: Device) -> float:
    """Return the seconds of one collective or message: bytes over the link, plus a latency."""
    sizes = dict(plan.mesh_sizes)
    n = 1
    for axis in c.axes:
        n *= sizes[axis]
    within = _span(c.axes, plan) <= device.node_ranks
    bandwidth = device.node_bandwidth if within else device.network_bandwidth
    passes = {"psum": 2 * (n - 1) / n, "pmax": 2 * (n - 1) / n, "send": 1.0, "ppermute": 1.0}.get(
        c.kind, (n - 1) / n
    )
    return c.bytes * passes / bandwidth + device.latency


def _span(axes: tuple[str, ...], plan: Plan) -> int:
    """Return how many consecutive ranks a group over axes reaches across."""
    span = 1
    inner = 1
    for name, size in reversed(plan.mesh_sizes):
        if name in axes:
            span = inner * size
        inner *= size
    return span
