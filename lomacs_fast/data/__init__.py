"""Channel data: layouts in and out, the built-in generator, statistics, augmentation, loaders."""

from .augmentation import Augmentation, frobenius_normalize
from .contest import ContestWriter, open_contest, write_contest
from .generator import ChannelGenerator
from .layouts import ChannelSource, open_channels, to_complex
from .output import PredictionWriter, load_predictions
from .statistics import channel_statistics, summarize

__all__ = [
    "Augmentation",
    "ChannelGenerator",
    "ChannelSource",
    "ContestWriter",
    "PredictionWriter",
    "channel_statistics",
    "frobenius_normalize",
    "load_predictions",
    "open_channels",
    "open_contest",
    "summarize",
    "to_complex",
    "write_contest",
]
