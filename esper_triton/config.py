"""A whole growing run in one file: `python -m esper_triton.config` prints one with every default and what it means."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from esper_triton.contracts.errors import ConfigError, nearest
from esper_triton.contracts.files import read_body, write_toml
from esper_triton.contracts.record import ProverTag

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from esper_triton.kasmina import Policy
    from esper_triton.model import GrowthHook, MorphableModel
    from esper_triton.tamiyo import Heuristic
    from esper_triton.urza import Urza

__all__ = ["GrowthConfig", "load_config"]


def _class_of_torch(name: str) -> str:
    from torch import nn

    known = [key for key, value in vars(nn).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    if name not in known:
        raise ValueError(f"torch.nn has no module {name!r}{nearest(name, known)}")
    return name


def _described(schedule: dict[str, Any]) -> dict[str, Any]:
    from esper_triton.kasmina.schedules import schedule_from

    schedule_from(schedule)
    return schedule


# Strict, since true is no number, and '3' is a text.
_Number = Annotated[float, Field(strict=True)]
_Flag = Annotated[bool, Field(strict=True)]
_Steps = Annotated[int, Field(strict=True, ge=0)]
_Positive = Annotated[int, Field(strict=True, ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WrapSection(_Section):
    """Which layers get seeds, and how many: `esper.wrap`."""

    target_layers: tuple[str, ...] = Field(
        default=(), description="qualified names of layers, and globs as encoder.*.fc1"
    )
    target_types: tuple[Annotated[str, AfterValidator(_class_of_torch)], ...] = Field(
        default=(), description="classes of torch.nn, all of whose layers are meant, as Linear"
    )
    seeds_per_layer: _Positive = Field(default=4, description="seeds of each layer")
    chunking: Literal["features", "whole"] = Field(
        default="features", description="whether seeds divide a layer's columns, or each has all of them"
    )
    guard: _Flag = Field(
        default=False, description="select away non-finite outputs of a seed in every call, on the device"
    )
    telemetry_enabled: _Flag = Field(
        default=True, description="measure the time of active calls, and sample what seeds put out"
    )


class PolicySection(_Section):
    """What a seed must have shown before it goes on, and how long its stages take: `kasmina.Policy`."""

    max_reconstruction_error: _Number = Field(
        default=0.01, ge=0, description="a seed in TRAINING with no more is grafted"
    )
    max_training_steps: _Steps = Field(
        default=1000, description="and so is one after as many steps, whatever its error"
    )
    metric_noises: _Number = Field(
        default=1.0, ge=0, description="the metric must differ by so many times its measured noise"
    )
    max_error_rate: _Number = Field(default=0.10, ge=0, le=1, description="of a seed's calls; with more it is culled")
    min_calls: _Positive = Field(default=20, description="fewer calls count as so many, for that rate")
    schedule: Annotated[dict[str, Any], AfterValidator(_described)] = Field(
        default={"schedule": "linear", "steps": 100},
        description="how alpha rises: linear, cosine, drift_controlled (max_drift) or grad_norm_gated (low, high)",
    )
    stabilization_steps: _Steps = Field(default=100, description="steps for which a grafted seed is frozen")
    fine_tuning_steps: _Steps = Field(
        default=1000, description="steps for which an accepted seed trains on the main loss"
    )
    embargo_epochs: _Steps = Field(default=5, description="epochs for which the slot of a culled seed takes no other")
    load_deadline_s: _Number = Field(default=10.0, gt=0, description="seconds that a load in the background may take")
    sample_every: _Steps = Field(default=100, description="steps between checks for non-finite outputs; 0 for never")
    statistics_share: _Number = Field(
        default=0.005, ge=0, le=1, description="of the time of steps, for statistics of activations; 0 for none"
    )
    statistics_every: _Steps | None = Field(
        default=None, description="steps between two samples of activations, in place of a share of time"
    )


class HeuristicSection(_Section):
    """The controller: `esper.Heuristic`. Leave the whole section out for none."""

    warmup_epochs: _Steps = Field(default=1, description="epochs before the first seed")
    plateau_epochs: _Steps = Field(
        default=2, description="epochs without a better metric before a seed; 0 does not wait"
    )
    embargo_epochs: _Steps = Field(default=5, description="epochs for which a layer is left alone after a failure")
    max_seeds: _Positive | None = Field(
        default=None, description="seeds that may become part of the model; no limit by default"
    )
    blueprints: tuple[str, ...] = Field(default=(), description="names of the only designs to try; empty for all")
    required: tuple[ProverTag, ...] = Field(default=(), description="tags that a kernel must have")
    preferred: tuple[ProverTag, ...] = Field(default=(), description="tags that put a kernel first")
    excluded: tuple[ProverTag, ...] = Field(default=(), description="tags that a kernel must not have")
    max_latency_us: _Number | None = Field(
        default=None, gt=0, description="microseconds of a kernel's launch; no limit by default"
    )


class HookSection(_Section):
    """Boundaries, measuring and checkpoints: `esper.GrowthHook`."""

    checkpoints: str | None = Field(
        default=None, description="a directory; without one the last state is kept in memory"
    )
    keep: _Positive = Field(default=3, description="checkpoints in the directory")
    checkpoint_every: _Positive = Field(default=1, description="epochs between two checkpoints")
    lower_is_better: _Flag = Field(default=True, description="whether the validation metric is a loss")
    repeats: Annotated[int, Field(strict=True, ge=2)] = Field(
        default=2, description="measurements of the metric with a seed on and off"
    )
    undecided_evaluations: _Positive = Field(default=3, description="after so many without a verdict a seed is culled")
    auto_advance: _Flag = Field(default=True, description="whether seeds make their next move by themselves")
    control_every: _Positive = Field(default=10, description="steps between two questions to the controller")
    measure_every: _Steps = Field(
        default=100, description="steps between two rounds of measuring gradients, where they are needed; 0 for never"
    )
    max_rollbacks: _Positive = Field(default=3, description="ways back to one checkpoint before TrainingDiverged")


class DivergenceSection(_Section):
    """When the loss counts as diverged: `esper.LossWatch`."""

    factor: _Number = Field(default=10.0, gt=1, description="times the running median that are too high")
    patience: _Positive = Field(default=5, description="steps in a row that have to be too high")
    window: Annotated[int, Field(strict=True, ge=10)] = Field(default=100, description="losses that the median is of")


class GrowthConfig(_Section):
    """A growing run, but for what is code: the model, the optimizer and the validation function.

    Made by `load_config`, or in code, section by section: `GrowthConfig(wrap={"target_types": ["Linear"]})`.

    Tags are those of the prover: `Heuristic` takes others too, and `make_hook(..., controller=...)` takes one.

    Raises ConfigError, which lists every fault with its place and the nearest name.
    """

    urza: str = Field(default="", description="where kernels are stored: a directory, or the address of a server")
    wrap: WrapSection = WrapSection()
    policy: PolicySection = PolicySection()
    heuristic: HeuristicSection | None = None
    hook: HookSection = HookSection()
    divergence: DivergenceSection = DivergenceSection()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(_faults(error))) from error

    def make_urza(self) -> Urza:
        """The store; the default one where none is named."""
        import esper_triton.urza as urza

        return urza.Urza(self.urza or urza.default_root())

    def make_policy(self) -> Policy:
        """The gates."""
        from esper_triton import kasmina
        from esper_triton.kasmina.schedules import schedule_from

        section = self.policy
        return kasmina.Policy(
            to_grafting=kasmina.ReconstructionGate(
                max_error=section.max_reconstruction_error, max_steps=section.max_training_steps
            ),
            metric=kasmina.MetricGate(noises=section.metric_noises),
            error_rate=kasmina.ErrorRateGate(max_rate=section.max_error_rate, min_calls=section.min_calls),
            schedule=schedule_from(section.schedule),
            stabilization_steps=section.stabilization_steps,
            fine_tuning_steps=section.fine_tuning_steps,
            embargo_epochs=section.embargo_epochs,
            load_deadline_s=section.load_deadline_s,
            sample_every=section.sample_every,
            statistics_share=section.statistics_share,
            statistics_every=section.statistics_every,
        )

    def wrap_model(self, model: nn.Module, urza: Urza | None = None) -> MorphableModel:
        """`esper.wrap` as the file says. Raises what it raises."""
        from torch import nn

        from esper_triton.model import wrap

        return wrap(
            model,
            [*self.wrap.target_layers, *(getattr(nn, name) for name in self.wrap.target_types)],
            urza=urza if urza is not None else self.make_urza(),
            policy=self.make_policy(),
            **self.wrap.model_dump(exclude={"target_layers", "target_types"}),
        )

    def make_controller(self, urza: Urza) -> Heuristic | None:
        """The controller; None without its section."""
        from esper_triton.tamiyo import Heuristic

        return None if self.heuristic is None else Heuristic(urza, **self.heuristic.model_dump())

    def make_hook(
        self,
        model: MorphableModel,
        optimizer: Optimizer,
        *,
        validate: Callable[[nn.Module], float] | None = None,
        urza: Urza | None = None,
        **options: Any,
    ) -> GrowthHook:
        """`esper.GrowthHook` as the file says; `options` (as `schedulers`, `carry`) go before it. `urza`: where the
        controller looks, by default the store that the model was wrapped with."""
        from esper_triton.model import GrowthHook, LossWatch

        if urza is None:
            stores = [layer._kasmina.urza for layer in model.kasmina_layers.values()]
            urza = next((store for store in stores if store is not None), None) or self.make_urza()
        known = self.hook.model_dump() | {
            "controller": self.make_controller(urza),
            "divergence": LossWatch(**self.divergence.model_dump()),
        }
        return GrowthHook(model, optimizer, validate=validate, **(known | options))


def load_config(path: str | Path) -> GrowthConfig:
    """Reads a TOML or YAML file (`.toml`, `.yaml`, `.yml`; YAML needs the extra `yaml`).

    Raises ConfigError, which lists every fault with its place and the nearest name, and FileNotFoundError.
    """
    path = Path(path)
    try:
        return GrowthConfig(**_read(path))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml"):
        raise ValueError(f"it ends in {suffix or 'nothing'}, expected .toml, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark before the text
    except UnicodeDecodeError as error:
        marked = error.object.startswith((b"\xff\xfe", b"\xfe\xff"))
        hint = "; it begins as UTF-16 does, and UTF-8 is expected" if marked else ""
        raise ValueError(f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}{hint}") from error
    return read_body(text, is_json=False) if suffix == ".toml" else _read_yaml(text)


def _read_yaml(text: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("reading YAML needs PyYAML: pip install 'esper-triton[yaml]', or write TOML") from error
    try:
        body = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"a mapping is expected, found {type(body).__name__}")
    return {str(name): value for name, value in body.items()}


_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "float_type": "a number, as 0.5 or 1.0e-3",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "model_type": "a table",
    "string_type": "a text",
    "tuple_type": "a list",
}


def _faults(error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        kind, found, place = item["type"], item["input"], [str(part) for part in item["loc"]]
        where, context = ".".join(place), item.get("ctx", {})
        if kind in ("extra_forbidden", "invalid_key"):
            yield f"{where}: there is no such name{nearest(place[-1], _names(place[:-1]))}"
        elif kind == "value_error":
            yield f"{where}: {context['error']}"
        else:
            expected = _EXPECTED[kind].format(**context)
            close = nearest(found, re.findall(r"'(\w+)'", expected)) if isinstance(found, str) else ""
            yield f"{where}: must be {expected}, found {found!r}" + (close if close.endswith("?") else "")


def _names(place: Sequence[str]) -> list[str]:
    fields: Mapping[str, Any] = GrowthConfig.model_fields
    for part in place:
        fields = _section_of(fields[part].annotation).model_fields
    return list(fields)


def _section_of(annotation: Any) -> type[_Section]:
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    return next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, _Section))


def documented() -> str:
    """TOML with every default, each after what it means; what has no default value is a comment."""
    lines = ["# What a growing run may say. Every value is the default, and every line may be left out."]
    sections = []
    for name, field in GrowthConfig.model_fields.items():
        if field.description is not None:
            lines += _entry(name, field.default, field.description)
        else:
            section = _section_of(field.annotation)
            sections += ["", *(f"# {line}" for line in (section.__doc__ or "").splitlines()), f"[{name}]"]
            for key, own in section.model_fields.items():
                sections += _entry(key, own.default, own.description or "")
    return "\n".join(lines + sections) + "\n"


def _entry(name: str, default: Any, description: str) -> list[str]:
    if default is None:
        return [f"# {name}: {description}"]
    value = write_toml({"v": list(default)} if isinstance(default, tuple) else {"v": default})
    if isinstance(default, dict):
        value = write_toml({"v": [default]}).replace("[", "", 1).rstrip().removesuffix("]")
    return [f"{name} = {value.removeprefix('v = ').strip()}  # {description}"]


def main() -> int:
    """Prints every option with its default. Returns 0."""
    sys.stdout.write(documented())
    return 0


if __name__ == "__main__":
    from esper_triton.command_output import run_command

    run_command(main)
