"""Where the numbers of a run go besides its database. One place a file."""

from learnables.watching.sinks.base import Sink
from learnables.watching.sinks.jsonl import JSONLines
from learnables.watching.sinks.tensorboard import TensorBoard

__all__ = ["JSONLines", "Sink", "TensorBoard"]
