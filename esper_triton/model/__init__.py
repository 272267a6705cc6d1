"""A whole model with seeds: wrapping, naming its layers, and taking the wrap off again; optimizers that follow it."""

from esper_triton.model.morphable import MorphableModel, seed_parameters, unwrap, wrap
from esper_triton.model.optim import Attachment, attach

__all__ = ["Attachment", "MorphableModel", "attach", "seed_parameters", "unwrap", "wrap"]
