"""One Parameter under several names: ``ln.tie``, also transposed."""

from learnables.sharing.tie import tie, untie

__all__ = ["tie", "untie"]
