"""A whole model with seeds: wrapping, naming its layers, and taking the wrap off again; optimizers that follow it;
checkpoints; and making it fixed."""

from esper_triton.model.baking import bake
from esper_triton.model.checkpoint import esper_state_dict, load_esper_state_dict
from esper_triton.model.distributed import Replicas, replicate
from esper_triton.model.divergence import LossWatch, Rollback
from esper_triton.model.hook import GrowthHook
from esper_triton.model.morphable import MorphableModel, seed_parameters, unwrap, wrap
from esper_triton.model.optim import Attachment, attach
from esper_triton.model.remote import Remote, connect
from esper_triton.model.saving import load_model, save_model

__all__ = [
    "Attachment",
    "GrowthHook",
    "LossWatch",
    "MorphableModel",
    "Remote",
    "Replicas",
    "Rollback",
    "attach",
    "bake",
    "connect",
    "esper_state_dict",
    "load_esper_state_dict",
    "load_model",
    "replicate",
    "save_model",
    "seed_parameters",
    "unwrap",
    "wrap",
]
