"""What a machine can do: rates, links and how much communication hides, as one value."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU in its node and network.

    Args:
        name: for print.
        peak_flops: datasheet rate that MFU is measured against, FLOP/s.
        product_rate: sustained rate of matrix products, FLOP/s.
        product_rate_narrow: of products whose smallest extent on a rank is 1024, relative; rates
            fall towards it as tensor parallelism narrows products.
        attention_rate: sustained rate of causal attention, forward and backward, FLOP/s.
        memory_bandwidth: bytes/s.
        elementwise_traffic: bytes moved by everything that is no product, per byte that the
            backward keeps.
        node_ranks: ranks that share the fast links.
        node_bandwidth: of one rank within the node, bytes/s each way.
        network_bandwidth: of one rank between nodes, bytes/s each way.
        latency: of a collective or message, seconds.
        exposed_model: part of the time of collectives inside the model that compute does not hide.
        exposed_sync: the same for gradient syncs.
        step_overhead: seconds per step for everything else (optimizer launch, loading, logging).
    """

    name: str
    peak_flops: float
    product_rate: float
    product_rate_narrow: float
    attention_rate: float
    memory_bandwidth: float
    elementwise_traffic: float
    node_ranks: int
    node_bandwidth: float
    network_bandwidth: float
    latency: float
    exposed_model: float
    exposed_sync: float
    step_overhead: float


H100_SXM = Device(
    name="H100 SXM, 8 per node, 400 Gb/s per GPU",
    peak_flops=989e12,
    product_rate=690e12,  # measured: all products of llama-1b, forward and backward, power-capped
    product_rate_narrow=0.85,
    attention_rate=500e12,  # measured: cuDNN, causal, seq 4096, forward 550 and backward 448
    memory_bandwidth=3.0e12,  # measured: device-to-device copy
    elementwise_traffic=2.2,  # measured: 44 ms of a step of llama-1b that keeps 61 GB
    node_ranks=8,
    node_bandwidth=360e9,
    network_bandwidth=40e9,
    latency=12e-6,
    exposed_model=0.8,
    exposed_sync=0.25,
    step_overhead=0.01,
)
"""Compute rates measured on one card; links are typical achieved values, not measured here."""

A100_SXM = Device(
    name="A100 SXM 80 GB, 8 per node, 200 Gb/s per GPU",
    peak_flops=312e12,
    product_rate=230e12,
    product_rate_narrow=0.85,
    attention_rate=130e12,
    memory_bandwidth=1.6e12,
    elementwise_traffic=2.2,
    node_ranks=8,
    node_bandwidth=230e9,
    network_bandwidth=20e9,
    latency=12e-6,
    exposed_model=0.8,
    exposed_sync=0.25,
    step_overhead=0.01,
)
"""Typical achieved values, none of them measured here."""

DEVICES = {"h100": H100_SXM, "a100": A100_SXM}
"""Name on the command line -> device."""
