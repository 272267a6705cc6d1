"""Controllers: what looks at a model between its steps and decides which seeds it gets."""

from esper_triton.tamiyo.controller import Controller, Manual, StatefulController
from esper_triton.tamiyo.heuristic import Heuristic

__all__ = ["Controller", "Heuristic", "Manual", "StatefulController"]
