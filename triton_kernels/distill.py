"""Distillation: the divergence of a student from a teacher at a temperature and its own smoothed loss, one kernel.

Bytes: student and teacher are read twice, the second time in reverse while their ends are still in L2, and the gradient
is written once: three units of N×K where all of it fits L2, five where none does. A program takes whole rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from . import launch, operands
from .kernels import compiled_per_structure
from .row_math import exp_shifted, reference_point, term, weights


class Pair(NamedTuple):
    """Sums over some classes of the student's z and the teacher's t."""

    m: Any
    """max z"""
    plain: Any
    """Σ exp(z - m)"""
    warm: Any
    """Σ exp((z - m)/T)"""
    rest: Any
    rest_d: Any
    """Σ u and Σ u·(z - m)"""
    m_t: Any
    """max t"""
    given: Any
    """Σ exp((t - m_t)/T)"""
    cross: Any
    """Σ exp((t - m_t)/T)·((t - m_t) - (z - m))/T"""


@jit
def _moved(p, m, m_t, cold):
    """A pair seen from maxima of at least its own."""
    down, down_t = p.m - reference_point(m), p.m_t - reference_point(m_t)
    factor, factor_t = tl.exp(down * cold), tl.exp(down_t * cold)
    cross = p.cross + term(p.given, (down_t - down) * cold)
    cross = tl.where(factor_t == 0.0, 0.0, cross * factor_t)  # a vanished class may be masked in the student
    rest_d = p.rest_d + term(p.rest, down)
    return Pair(m, p.plain * exp_shifted(p.m, m), p.warm * factor, p.rest, rest_d, m_t, p.given * factor_t, cross)


@jit
def _absorb(p, b_z, b_t, b_u, m_o, cold, HARD: tl.constexpr):
    """The pair p with one block of classes more, whose masked lanes hold -inf and u = 0."""
    m, m_t = tl.maximum(p.m, tl.max(b_z, 0)), tl.maximum(p.m_t, tl.max(b_t, 0))
    p = _moved(p, m, m_t, cold)
    b_down, b_down_t = b_z - reference_point(m), b_t - reference_point(m_t)
    b_given = tl.exp(b_down_t * cold)
    cross = p.cross + tl.sum(tl.where(b_given == 0.0, 0.0, b_given * ((b_down_t - b_down) * cold)), 0)
    plain, rest, rest_d = p.plain, p.rest, p.rest_d
    if HARD:
        plain += tl.sum(tl.exp(b_down), 0)
        rest += tl.sum(b_u, 0)
        rest_d += tl.sum(term(b_u, tl.where(m_o, b_down, 0.0)), 0)
    return Pair(
        m, plain, p.warm + tl.sum(tl.exp(b_down * cold), 0), rest, rest_d, m_t, p.given + tl.sum(b_given, 0), cross
    )


@jit
def _prior(prior_ptr, o, m_o):
    return tl.where(m_o, 1.0, 0.0) if prior_ptr is None else tl.load(prior_ptr + o, mask=m_o, other=0.0)


@jit
def _row(ptr, i_row, stride, VEC: tl.constexpr):
    """Where a row begins; the division changes nothing, it proves the alignment."""
    return ptr + stride.to(tl.int64) * i_row // VEC * VEC


@compiled_per_structure
def distill_kernel(
    x_ptr, t_ptr, grad_ptr, target_ptr, prior_ptr, eps_ptr, scale_ptr, terms_ptr, n_rows, K, x_row, t_row, g_row, eps,
    eps_stride, scale_stride, ignore_index, others, alpha, temperature,
    BLOCK: tl.constexpr, VEC: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Terms (2, N) of every row and, where there is a pointer for it, the gradient: of both terms that have a share."""
    K = K // VEC * VEC
    cold = 1.0 / temperature
    for i_row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        label = tl.load(target_ptr + i_row)
        live = label != ignore_index
        valid = live & (label >= 0) & (label < K)
        y = tl.where(valid, label, -1).to(tl.int32)
        x, t = _row(x_ptr, i_row, x_row, VEC), _row(t_ptr, i_row, t_row, VEC)
        n_read = tl.where(live, K, 0)
        none, zero = float("-inf"), tl.full((), 0.0, tl.float32)
        p = Pair(zero + none, zero, zero, zero, zero, zero + none, zero, zero)
        for o_block in range(0, n_read, BLOCK):
            o = o_block + tl.arange(0, BLOCK)
            m_o = o < n_read
            b_z = tl.load(x + o, mask=m_o, other=none).to(tl.float32)
            b_t = tl.load(t + o, mask=m_o, other=none).to(tl.float32)
            p = _absorb(p, b_z, b_t, _prior(prior_ptr, o, m_o), m_o, cold, HARD)
        logsum, warm, given = tl.log(p.plain), tl.log(p.warm), tl.log(p.given)
        e = eps if eps_ptr is None else tl.load(eps_ptr + eps_stride.to(tl.int64) * i_row)
        n = K.to(tl.float32) if prior_ptr is None else 1.0
        a, b = weights(e, n, others)
        mass = 1.0 if prior_ptr is None else a + b * p.rest
        divergence = p.cross / p.given - (given - warm)
        z_y = tl.load(x + y, mask=valid, other=0.0).to(tl.float32)
        loss = 0.0
        if HARD:
            loss = mass * logsum - (term(a, z_y - p.m) + term(b, p.rest_d))
        wrong = float("nan")
        divergence = tl.where(valid, tl.where(divergence < 0.0, 0.0, divergence), wrong)
        tl.store(terms_ptr + i_row, tl.where(live, divergence, 0.0))
        tl.store(terms_ptr + n_rows.to(tl.int64) + i_row, tl.where(live, tl.where(valid, loss, wrong), 0.0))
        if grad_ptr is not None:
            factor = 1.0 if scale_ptr is None else tl.load(scale_ptr + scale_stride.to(tl.int64) * i_row)
            factor = tl.where(valid, factor, wrong)
            soft, hard = factor * alpha * temperature, factor * (1.0 - alpha)
            g = _row(grad_ptr, i_row, g_row, VEC)
            n_blocks = (K + BLOCK - 1) // BLOCK
            for i_block in range(n_blocks):
                o = (n_blocks - 1 - i_block) * BLOCK + tl.arange(0, BLOCK)
                b_z = tl.load(x + o, mask=o < n_read, other=none).to(tl.float32)
                b_grad = 0.0
                if SOFT:  # else the teacher may be anything
                    b_t = tl.load(t + o, mask=o < n_read, other=none).to(tl.float32)
                    b_grad = soft * (tl.exp((b_z - p.m) * cold - warm) - tl.exp((b_t - p.m_t) * cold - given))
                if HARD:
                    b_q = b * _prior(prior_ptr, o, o < K) + tl.where(o == y, a, 0.0)
                    b_grad += hard * (mass * tl.exp((b_z - p.m) - logsum) - b_q)
                tl.store(g + o, tl.where(live, b_grad, 0.0).to(grad_ptr.dtype.element_ty), mask=o < K)


def _check(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> None:
    operands.check_served("student", student)
    require = operands.require
    require(student.dim() == 2, "student", "have 2 dimensions", f"shape {tuple(student.shape)}")
    like = f"be {student.dtype} of shape {tuple(student.shape)}, as student is"
    same = teacher.dtype == student.dtype and teacher.shape == student.shape
    require(same, "teacher", like, f"{teacher.dtype} of shape {tuple(teacher.shape)}")
    operands.check_device("teacher", teacher, student.device)
    for name, tensor in (("student", student), ("teacher", teacher)):
        adjacent = tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
        require(adjacent, name, "have adjacent classes", f"strides {tensor.stride()}")
    operands.check_index_target(target, len(student), student.device)
    require(temperature > 0, "temperature", "be positive", temperature)


def distill(
    student: Tensor, teacher: Tensor, target: Tensor, prior: Tensor | None, eps: float, eps_rows: Tensor | None,
    row_scale: Tensor | None, ignore_index: int, others: bool, alpha: float, temperature: float, with_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator ``distill`` of ``labelsmooth_kernels.ops``."""
    _check(student, teacher, target, temperature)
    n, k = student.shape
    for name, vector, sizes in (
        ("prior", prior, (k,)),
        ("eps_rows", eps_rows, (1, n)),
        ("row_scale", row_scale, (1, n)),
    ):
        operands.check_vector(name, vector, sizes, student.device)
    terms, made = student.new_empty((2, n), dtype=torch.float32), student.new_empty((n, k) if with_grad else 0)
    if n == 0:
        return terms, made
    grad = made if with_grad else None
    tensors = [student, teacher, made] if with_grad else [student, teacher]
    vec = 16 // student.element_size()
    whole = all(v.data_ptr() % 16 == 0 and v.stride(0) % vec == 0 for v in tensors)
    strides = [0 if v is None or v.numel() == 1 else 1 for v in (eps_rows, row_scale)]
    rows = (student.stride(0), teacher.stride(0), k)
    pointers = (student, teacher, grad, target, prior, eps_rows, row_scale, terms)
    numbers = (n, k, *rows, eps, *strides, ignore_index, int(others), alpha, temperature)
    plan = launch.distill_plan(student, k)
    shares = {"SOFT": alpha != 0, "HARD": alpha != 1}
    launch.start(distill_kernel, plan, n, (*pointers, *numbers), VEC=vec if whole else 1, **shares)
    return terms, made
