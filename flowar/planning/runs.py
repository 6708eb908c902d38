"""How failures, preemptions and saves lengthen a run. Read next: steps.py.

Young's and Daly's interval (J. T. Daly, 2006) balances the cost of a save against what a failure loses, half an
interval.
"""

import math
from dataclasses import dataclass

DAY_S = 86400
STAGING_BYTES_PER_S = 2e9  # from a GPU to the memory of its host, which is not pinned; assumed
LEAST_SAVE_S = 0.5  # of any save, on the host; assumed
CHECKPOINT_COPIES = 3  # weights and AdamW's two moments; averages come on top


@dataclass(frozen=True)
class Troubles:
    """How often a run is interrupted, and what that costs."""

    nodes: int
    node_mtbf_days: float  # mean time between failures of one node
    preemptions_per_day: float
    restart_s: float  # from a failure to the next step
    save_bytes_per_s: float  # of the file system, all ranks together


@dataclass(frozen=True)
class RunTime:
    """The expected course of a run."""

    days: float
    goodput: float  # share of the time spent on steps that aren't lost
    save_every_s: float  # the best interval
    failures: float  # of nodes, in total
    save_s: float  # how long a save stops training
    written_s: float  # until a save is complete on disk


def expect(working_s: float, weights: int, averages: int, writers: int, troubles: Troubles) -> RunTime:
    """Return the expected time of a run.

    A failure loses half an interval and the save in progress; a preemption is announced, so the run saves first.

    Args:
        working_s: seconds of all steps.
        weights: number of parameters.
        averages: how many averages of the weights a checkpoint holds.
        writers: GPUs that hold different parts of the checkpoint.
        troubles: failures and preemptions.
    """
    size = 4 * weights * (CHECKPOINT_COPIES + averages)
    save_s = max(LEAST_SAVE_S, size / writers / STAGING_BYTES_PER_S)
    written_s = size / troubles.save_bytes_per_s
    between_s = DAY_S * troubles.node_mtbf_days / troubles.nodes
    interval = max(math.sqrt(2 * save_s * between_s), written_s)
    saving = save_s / interval
    lost = (interval / 2 + written_s + troubles.restart_s) / between_s
    stopped = troubles.preemptions_per_day / DAY_S * (troubles.restart_s + save_s + written_s)
    goodput = max(0.0, 1 - saving - lost - stopped)
    total_s = working_s / goodput if goodput else math.inf
    return RunTime(total_s / DAY_S, goodput, interval, total_s / between_s, save_s, written_s)
