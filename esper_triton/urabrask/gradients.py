"""Finite differences: whether the gradients that kernels are measured against are those of the reference."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from esper_triton.urabrask.draws import cases
from esper_triton.urabrask.oracle import K, Question
from esper_triton.urabrask.trial import CheckLog, Trial, broken

__all__ = ["check_affine", "check_gradients"]

_STEP = 1e-5  # error of the second order 1e-10, and 1e-11 of rounding
_CLOSE = 1e-5
_TRIES = 3


def check_gradients(trial: Trial, log: CheckLog, seed: int) -> None:
    """The derivative along a drawn direction in each operand of k, by central differences in float64, and autograd's.

    A step may cross a kink (of relu, say), where no derivative is the right one; what fails is tried on other numbers,
    and is wrong where it fails three times.
    """
    failed: dict[str, str] = {}
    groups = (group[0] for group in cases(trial.subject, seed) if group[0].values == "normal")
    for attempt, case in enumerate(itertools.islice(groups, _TRIES)):
        case = case.model_copy(update={"training": False})
        question = _in_float64(trial.question(case, trial.tensors(case)))
        answer = trial.oracle.exact(question)
        generator = torch.Generator().manual_seed(case.seed)
        operands = {**question.inputs, **question.parameters}
        wrong = {}
        for name in failed if attempt else operands:
            value = operands[name]
            direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            slope = float((answer[f"grad_{name}"] * direction).sum())
            terms = float((answer[f"grad_{name}"] * direction).abs().sum()) + float(answer[K].abs().sum()) * _STEP
            ahead, behind = (
                trial.oracle.exact(_moved(question, name, value + step * direction))[K] for step in (_STEP, -_STEP)
            )
            difference = float(((ahead - behind) * question.grad_k).sum()) / (2 * _STEP)
            if not abs(difference - slope) <= _CLOSE * max(terms, 1e-12):
                wrong[name] = (
                    f"the reference's gradient of {name} along a direction is {slope:.8g}, its slope {difference:.8g}"
                )
        log.cases += len(operands) if not attempt else 0
        failed = wrong
        if not failed:
            return
    log.note(case, [broken(f"finite differences of {name}", text) for name, text in failed.items()])


def _in_float64(question: Question) -> Question:
    return Question(
        extents=question.extents,
        inputs={name: value.double() for name, value in question.inputs.items()},
        parameters={name: value.double() for name, value in question.parameters.items()},
        grad_k=question.grad_k.double(),
        seed=question.seed,
    )


def _moved(question: Question, name: str, value: Tensor) -> Question:
    """With another value for one operand."""
    if name in question.inputs:
        return dataclasses.replace(question, inputs={**question.inputs, name: value})
    return dataclasses.replace(question, parameters={**question.parameters, name: value})


def check_affine(trial: Trial, log: CheckLog, seed: int) -> None:
    """Of a blueprint that calls itself affine: k(u + v) + k(0) = k(u) + k(v) in float64, close together and far out."""
    group = next(group for group in cases(trial.subject, seed) if group[0].values == "normal" and group[0].rows > 2)
    case = group[0].model_copy(update={"training": False})
    question = _in_float64(trial.question(case, trial.tensors(case)))
    generator = torch.Generator().manual_seed(case.seed)
    # Far apart and close together: a function that is affine in between, or far out, is not affine.
    for scale in (1e-3, 1.0, 1e3):
        u, v = (
            {
                name: scale * torch.randn(value.shape, generator=generator, dtype=torch.float64)
                for name, value in question.inputs.items()
            }
            for _ in range(2)
        )
        points = (u, v, {name: u[name] + v[name] for name in u}, {name: torch.zeros_like(u[name]) for name in u})
        k_u, k_v, k_both, k_zero = (
            trial.oracle.exact(dataclasses.replace(question, inputs=inputs))[K] for inputs in points
        )
        terms = sum(trial.subject.manifest.dims.values()) + case.length
        # Sums of so many terms in float64, each off by 2^-53 of its size; 1e3 for terms that cancel in a drawn sum.
        size = (k_u.abs() + k_v.abs() + k_zero.abs()).max()
        log.cases += 1
        if not ((k_both + k_zero - k_u - k_v).abs() <= 1e3 * terms * 2.0**-53 * size).all():
            log.remark("the blueprint says that k is affine in its inputs, and its reference is not")
            return
