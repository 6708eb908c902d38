"""For the fork server alone: what takes a process a second when it is done for the first time is done before a fork."""

from flowar.config.models import FlowARConfig
from flowar.models.costs import count_training_flops

count_training_flops(
    FlowARConfig(
        variant="custom", scales=(1, 2), ar_depth=2, ar_width=32, ar_heads=2, flow_depth=1, flow_width=32, flow_heads=2
    )
)
