"""A whole model with seeds: wrapping, naming its layers, and taking the wrap off again."""

from esper_triton.model.morphable import MorphableModel, seed_parameters, unwrap, wrap

__all__ = ["MorphableModel", "seed_parameters", "unwrap", "wrap"]
