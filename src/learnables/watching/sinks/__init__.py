"""Where the numbers of a run go besides its database. One place a file."""

from learnables.watching.sinks.base import Sink
from learnables.watching.sinks.csv import CSV
from learnables.watching.sinks.jsonl import JSONLines
from learnables.watching.sinks.tensorboard import TensorBoard
from learnables.watching.sinks.trackio import Trackio
from learnables.watching.sinks.wandb import WeightsAndBiases

__all__ = ["CSV", "JSONLines", "Sink", "TensorBoard", "Trackio", "WeightsAndBiases"]
