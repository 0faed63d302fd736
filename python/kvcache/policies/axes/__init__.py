"""What a policy may decide, a class for each axis; ``base.Policy`` has them all."""

from .merging import Merged, Merging
from .positions import Positions
from .retention import NEEDS, Retention
from .routing import Routing
from .schedule import Schedule
from .selection import Selecting, Selection

__all__ = ["NEEDS", "Merged", "Merging", "Positions", "Retention", "Routing", "Schedule", "Selecting", "Selection"]
