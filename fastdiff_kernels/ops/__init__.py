"""Temporary: the definitions themselves, until the registered ops land."""
from ..reference.attention import *  # noqa
from ..reference.distillation import *  # noqa
from ..reference.group_norm import *  # noqa
from ..reference.modulate import *  # noqa
from ..reference.rotary import *  # noqa
from ..reference.sampling import *  # noqa
from ..reference.schedule import *  # noqa
from ..reference.score_matching import *  # noqa
from ..reference.skipping import *  # noqa
