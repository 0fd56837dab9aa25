"""What a run says while it trains: metrics.jsonl and events.jsonl, the console, and wandb."""

from __future__ import annotations

from ptm.common.config import Choice, config, ranged


class WandbMode(Choice):
    """Where wandb sends its copy of the metrics."""

    auto = "auto"
    online = "online"
    offline = "offline"
    off = "off"


class ProgressKind(Choice):
    """How the console shows a run."""

    auto = "auto"
    rich = "rich"
    plain = "plain"
    off = "off"


@config
class LogConfig:
    """Settings of the run's log; metrics.jsonl is always written."""

    wandb: WandbMode = WandbMode.auto
    "Copy of the metrics in wandb. auto: online when you are logged in, else offline in the run folder."
    project: str = "ptm"
    "Project name in wandb."
    progress: ProgressKind = ProgressKind.auto
    "Console display. auto: live bar on a terminal, one plain line a step elsewhere."
    plain_every_s: float = ranged(1.0, least=0.0)
    "Least time in seconds between two plain lines; 0 prints every step. First, last and evaluated steps always print."
