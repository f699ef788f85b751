"""Contract suites: hold your own set to the laws that ours are held to."""

from learnables.testing.sets import LAWS_OF_SETS, check_set

__all__ = ["LAWS_OF_SETS", "check_set"]
