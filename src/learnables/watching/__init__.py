"""Look at parameters, gradients and updates while they train; keep it; say what is wrong.

The recorder makes observations, the judge draws alarms from them, the store and the sinks keep
both, and `Run` reads them back.
"""

from learnables.watching.alarm import Alarm
from learnables.watching.observation import Observation
from learnables.watching.recorder import AlarmRaised, Watcher, watch
from learnables.watching.run import Run

__all__ = ["Alarm", "AlarmRaised", "Observation", "Run", "Watcher", "watch"]
