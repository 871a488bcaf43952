"""Pipeline schedules as data: made, checked, timed, drawn, and turned into per-rank programs."""

from megatree.parallel.schedule.action import Action, Kind, Schedule, feeds, needs
from megatree.parallel.schedule.channels import run_blocking, run_fifo
from megatree.parallel.schedule.costs import Costs
from megatree.parallel.schedule.csv import from_csv, from_rows
from megatree.parallel.schedule.draw import draw
from megatree.parallel.schedule.fill_drain import gpipe, one_f_one_b
from megatree.parallel.schedule.interleaved import interleaved
from megatree.parallel.schedule.live import peak_live
from megatree.parallel.schedule.messages import Event, Recv, Send, rank_programs
from megatree.parallel.schedule.plot import plot
from megatree.parallel.schedule.timeline import Timeline, timeline
from megatree.parallel.schedule.validate import validate
from megatree.parallel.schedule.zero_bubble import zero_bubble_h1, zero_bubble_v

__all__ = [
    "Action",
    "Costs",
    "Event",
    "Kind",
    "Recv",
    "Schedule",
    "Send",
    "Timeline",
    "draw",
    "feeds",
    "from_csv",
    "from_rows",
    "gpipe",
    "interleaved",
    "needs",
    "one_f_one_b",
    "peak_live",
    "plot",
    "rank_programs",
    "run_blocking",
    "run_fifo",
    "timeline",
    "validate",
    "zero_bubble_h1",
    "zero_bubble_v",
]
