"""The compiler of vecsim_torch.py: small functions, compiled for this CPU, against eager PyTorch and closed forms."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import random
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import emulated_cuda
import mujoco
import numpy as np
import pytest
import torch
from faults import broken
from test_vecsim_physics import FEATURES, batch, converged, visit
from test_vecsim_physics import random_tree as random_robot
from torch.utils._pytree import tree_map_only

import vecsim_torch as vecsim

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.float64)
SIZES = (1, 3, 16, 33)  # robots: one, less than a register, whole registers, and a rest


@functools.cache
def small_model(dtype=torch.float64):
    return vecsim.load_model(vecsim.compile_mjcf(vecsim.build_task("InvertedPendulum-v5", {}).source()), dtype=dtype)


def compiled(function, dtype=torch.float64):
    """`function` of tensors, compiled."""
    base = small_model(dtype)
    return functools.partial(vecsim.CompiledFunction(lambda _, *args: function(*args), base), base)


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """The list of the commands that compile; nothing has been compiled so far."""
    commands, run = [], subprocess.run

    def spy(command, **options):
        commands.append([str(word) for word in command])
        return run(command, **options)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", spy)
    return commands


# ----------------------------------------------------------------------------------------------------------------------
# Rules for PyTorch's operators
#
# x, y are (3, N), positive and bad (with NaN and infinities) too, t is (2, 3, N), and i (2, N) holds integers 0, 1, 2.
# ----------------------------------------------------------------------------------------------------------------------

TABLE = torch.tensor([[0.5, 2.0], [-1.0, 3.0], [0.25, -0.0]], dtype=torch.float64)
ROWS = torch.tensor([2, 0])
TRUTH_TABLE, INTEGER_TABLE = torch.tensor([True, False, True]), torch.tensor([2, 0, 1])


def written(x, y):
    """Writes into a copy of x."""
    z = x.clone()
    z[1:] = y[:2]
    z[0] = 2 * y[2]
    z[-1] = 0.5
    u = torch.ones_like(x)
    u[:, :] = x[:1]
    return z, u, x.new_zeros(3, 1).copy_(ROWS[0]) + x


def put(x, y, t):
    """Writes at masks and at indices."""
    z, u, v = x.clone(), t.clone(), x.clone()
    z[x > y] = 0.5
    u[u > 0] = 2.0
    u[:, [0, 2]] = 1.0
    v[ROWS] = y[:2]
    v[torch.tensor([False, True, False])] = 3.0
    return z, u, v


def constant(x):
    """TABLE in the precision of x."""
    return TABLE.to(x.dtype)


# Rules, and a function that uses them. A rule is named as PyTorch's operator is.
CASES = {
    "add": lambda x, y, **_: (x + y, x + 1.5, 2 + x, x + constant(x)[:, :1], x + 0),
    "sub": lambda x, y, **_: (x - y, x - 1.5, 2 - x, constant(x)[:, :1] - x, 0 - x, torch.rsub(x, y)),
    "mul": lambda x, y, i, **_: (x * y, 0 * x, 1 * x, -1 * x, x * constant(x)[:, :1], x[:2] * i, 3 * i),
    "div reciprocal": lambda x, y, **_: (x / y, x / 3, 2 / y, 0 / y, 1 / y, y.reciprocal(), x / 0.0),
    "neg abs": lambda x, y, bad, **_: (-x, -(x - y), x.neg().neg(), x.abs(), bad.abs()),
    "sqrt rsqrt": lambda x, positive, bad, i, **_: (
        *(positive.sqrt(), positive.rsqrt(), bad.sqrt(), (i * i).sqrt().to(x.dtype), (4**i).rsqrt().to(x.dtype)),
    ),
    "sin cos tan": lambda x, i, **_: (
        *(
            x.sin(),
            x.cos(),
            x.tan(),
            *((1e3 * f(z)).round().to(x.dtype) for f in (torch.sin, torch.cos, torch.tan) for z in (i, x > 0)),
        ),
        torch.cat((x, torch.full_like(x, INF))).sin(),
    ),
    "abs signbit div atan2": lambda x, **_: (  # of both zeros
        *(1 / (0 * x - 0.0).abs(), 1 / (-torch.zeros_like(x) * x.abs()).abs(), torch.copysign(x, -0.0 * x.abs())),
        *(x / 0.0, x / -0.0, torch.atan2(x, 0 * x), torch.atan2(x, torch.full_like(x, -0.0))),
    ),
    "hypot": lambda x, y, **_: (torch.hypot(x, y),),
    "pow": lambda x, positive, **_: (x**2, positive**1.7, positive**-0.5, x.square(), positive.pow(positive)),
    "maximum minimum": lambda x, y, bad, **_: (
        *(torch.maximum(x, y), torch.minimum(x, y), torch.maximum(bad, x), torch.maximum(x, bad)),
        *(torch.minimum(bad, x), torch.minimum(x, bad), torch.maximum(bad, bad.flip(0)), torch.minimum(bad, x.abs())),
    ),
    "exp exp2 expm1 log log1p log2 log10 erf": lambda x, positive, bad, **_: (
        *(x.exp(), x.exp2(), x.expm1(), positive.log(), positive.log1p(), positive.log2(), positive.log10(), x.erf()),
        *(bad.exp(), bad.log(), bad.erf()),
    ),
    "tanh sinh cosh asin acos atan atan2": lambda x, y, bad, **_: (
        *(x.tanh(), x.sinh(), x.cosh(), x.tanh().asin(), x.tanh().acos(), x.atan(), bad.asin(), bad.tanh()),
        *(torch.atan2(x, y), torch.atan2(x, bad), torch.atan2(bad, y)),
    ),
    "floor ceil trunc round": lambda x, bad, **_: (
        *(f(z) for f in (torch.floor, torch.ceil, torch.trunc, torch.round) for z in (3 * x, bad)),
        (2 * x).floor() / 2 + (0.5 * torch.ones_like(x)).round(),
    ),
    "sign signbit fmod": lambda x, y, i, bad, **_: (
        *(
            torch.signbit(x),
            torch.copysign(y, x),
            x.sign(),
            (0 * x).sign(),
            (i - 1).sign(),
            bad.isnan(),
            torch.fmod(5 * x, y),
            torch.fmod(x, 0.3),
        ),
    ),
    "remainder floor_divide": lambda x, positive, i, bad, **_: (
        *(torch.remainder(3 * x, positive), 3 * x % 0.7, i % 2, (i - 1) % 3, x // 0.7, 3 * x // positive, (i - 1) // 2),
        *(x // INF, x // -INF, x // 0.0, bad // 2, bad // x, x // bad),
    ),
    "mm bmm": lambda x, t, **_: (
        constant(x) @ x[:2],
        torch.einsum("ij,kjn->kin", constant(x)[:, :2], t[:, :2]),
        torch.bmm(t.permute(2, 0, 1), t.permute(2, 1, 0))[:, 0].T + x[:2],
    ),
    "argmax argmin max min": lambda x, y, t, i, bad, **_: (
        *(
            *bad.max(0),
            *bad.flip(0).min(0),
            x.argmax(0),
            x.argmin(0),
            t.argmax(1, keepdim=True),
            t.argmin(-2),
            i.argmax(0),
            torch.max(x, y),
        ),
        *(*x.max(0), *t.min(1, keepdim=True), torch.min(x, y), x.gather(0, x.argmax(0, keepdim=True))),
    ),
    "any all": lambda x, t, i, bad, **_: (
        *((x > 0).any(0), (x > 0).all(0), (t > -1).all((0, 1)), (t < 0).any(1, keepdim=True), i.any(0), x.all(0)),
        *(bad.isfinite().all(0), (x[:0] > 0).any(0) | (x[0] > 0)),
    ),
    "amax prod": lambda x, t, bad, **_: (
        *(x.amax(0), t.amax((0, 1)), x.prod(0), t.prod(1, keepdim=True), bad.amax(0), bad.amin(0)),
    ),
    "sort topk": lambda x, t, i, bad, **_: (
        *(*x.sort(0), *t.sort(-2, descending=True), *bad.sort(0), *bad.sort(0, descending=True), x[:1].sort(0)[0]),
        *(*x.topk(2, 0), *t.topk(1, 1, largest=False), bad.topk(1, 0)[0], bad.topk(2, 0, largest=False)[0]),
        *(t.argsort(0), x.sort(dim=0)[0], (x > 0).sort(0)[0], x[:0].sort(0)[1], x.topk(0, 0)[0] + 0),
        *torch.cat((i, bad.isnan(), i)).sort(0),  # equal rows
        *torch.cat((bad, bad)).sort(0),
        *torch.cat((bad, torch.zeros_like(x[:1]), bad)).sort(0, descending=True),
    ),
    "flip repeat": lambda x, t, **_: (x.flip(0), t.flip(0, 1) + 0, x.repeat(2, 1), x.repeat(2, 1, 1)),
    "full_like new_ones new_full": lambda x, **_: (
        *(torch.full_like(x, 2.5) * x, x.new_ones(3, 1) + x, x.new_full((3, 1), 0.5) * x),
    ),
    "slice_scatter select_scatter copy": lambda x, y, **_: written(x, y),
    "index_put": lambda x, y, t, **_: put(x, y, t),
    "var view_of broadcast_in_dim": lambda x, t, **_: (
        t.var(1),
        t.std((0, 1)),
        torch.nn.functional.layer_norm(x.T, (3,)).T,
        x.var(0, correction=0, keepdim=True),
        x[:, :],
    ),
    "clamp": lambda x, y, bad, **_: (
        *(z.clamp(-0.5, 0.25) for z in (x, bad)),
        *(z.clamp(min=-0.5) for z in (x, bad)),
        *(z.clamp(max=0.25) for z in (x, bad)),
        bad.clamp(min=-INF, max=1.0),
        x.clamp(constant(x)[:, :1], constant(x)[:, 1:]),
        x.clamp(max=y),
    ),
    "lt le gt ge eq ne where": lambda x, y, i, bad, **_: tuple(
        torch.where(truth, x[:2], y[:2])
        for a, b in ((x[:2], y[:2]), (x[:2], x[:2]), (bad[:2], 0.5), (i, 1), (1, i), (x[:2], 0.25), (i, x[:2]))
        for truth in (a < b, a <= b, a > b, a >= b, a == b, a != b)
    ),
    "where": lambda x, y, **_: (
        torch.where(x > 0, 1.0, 0.0) * y,
        torch.where(x > 0, y, 2.0),
        torch.where(x > 0, y, y),
        torch.where(constant(x)[:, :1] > 0, x, y),
        torch.where(x > 0, constant(x)[:, :1], constant(x)[:, 1:]),
        torch.where(x > 0, 3, 4),
    ),
    "bitwise_and bitwise_or bitwise_xor bitwise_not": lambda x, y, **_: tuple(
        truth.to(x.dtype)
        for truth in (
            *((x > 0) & (y > 0), (x > 0) | (y > 0), (x > 0) ^ (y > 0), ~(x > 0)),
            *((x > 0) & True, (x > 0) & False, (x > 0) | True, (x > 0) | False),
        )
    ),
    "ne bitwise_and bitwise_or": lambda x, y, i, bad, **_: tuple(
        truth.to(x.dtype)
        for truth in (
            torch.logical_and(x > 0, y > 0),
            torch.logical_and(i, i + 1),
            torch.logical_or(i - 1, x[:2]),
            torch.logical_not(i),
            torch.logical_not(bad),
            torch.logical_or(x > 0, y > 0),
            torch.logical_not(x > 0),
        )
    ),
    "sum": lambda x, t, i, **_: (
        *(t.sum(axes) for axes in (0, 1, -2, (0, 1), (-2, 0))),
        *(t.sum(axes, keepdim=True) for axes in (0, -2, (0, 1))),
        x[:0].sum(0) + x[0],
        t[:, :0].sum((0, 1)) + x[0],
        t[:, :0].sum(1) + x[:2],
        i.sum(0),
    ),
    "sum lt": lambda x, t, **_: ((x < 0.5).sum(0), (t < 0).sum((0, 1)), (x < 0.5).sum(0, keepdim=True) * x),
    "amin": lambda x, t, **_: (x.amin(0), t.amin(1), t.amin(-2, keepdim=True), t.amin((0, 1))),
    "_to_copy": lambda x, i, **_: (
        *((3 * x).long(), i.to(x.dtype) + 0.5, (x > 0).long(), (x > 0).to(x.dtype), x.to(x.dtype) + 0),
        (x > 0).int().sum(0) * x,
    ),
    "view _unsafe_view": lambda x, t, **_: (
        *(t.view(6, -1) + 0, t.reshape(3, 2, -1) * 2, x.view(3, 1, -1) + t.view(1, 6, -1)),
        t.transpose(0, 1).reshape(6, -1) + 0,
        (x + 1).view(torch.int32 if x.dtype == torch.float32 else torch.int64).long(),
    ),
    "index": lambda x, t, i, **_: (
        *(x[ROWS], x[[1, 1, 2, 0]], t[:, ROWS], t[ROWS % 2, ROWS], t[:, [[0, 1], [2, 2]]]),
        constant(x)[i[0], 0],
        constant(x)[i].sum(-1),
        constant(x)[i[1], 1] + x[0],
        constant(x)[i - 1].sum(-1),
        *(TRUTH_TABLE[i], ~TRUTH_TABLE[i - 2], INTEGER_TABLE[i[0]] + i[0], constant(x)[INTEGER_TABLE[i[0]], 0]),
        x[torch.tensor([True, False, True])] + 0,
    ),
    "gather": lambda x, t, i, **_: (
        *(x.gather(0, i), (x + 1).gather(0, i[:1])),
        t.transpose(0, 1).gather(0, i[:, None].expand(-1, 2, -1)),
        x.gather(0, ROWS[:, None].expand(-1, x.shape[1])),
        t.gather(1, i[:, None].expand(-1, 2, -1)),
        *((x > 0).gather(0, i), torch.stack((i[0], i[1], i[0])).gather(0, i)),
    ),
    "index_put index_add": lambda x, y, t, **_: (
        *(x.index_copy(0, ROWS, y[:2]), x.index_add(0, ROWS, y[:2]), t.index_copy(1, ROWS, t[:, 1:] + 1)),
        t.index_add(-2, ROWS, t[:, :2]),
        x.index_add(0, torch.tensor([1, 1, 2]), y),
        torch.zeros_like(x).index_add(0, ROWS, y[1:]),
        torch.ones_like(x).index_copy(0, ROWS, y[1:]),
    ),
    "zeros_like ones_like new_zeros": lambda x, y, **_: (
        *(torch.zeros_like(x) + y, torch.ones_like(x) - y, x.new_zeros(2, 3, 1) + y, torch.zeros_like(x)),
    ),
    "clone detach": lambda x, **_: (x.clone(), x.detach() + 1),
    "expand": lambda x, t, **_: (x.expand(2, 3, -1) * t, x[:1].expand(3, -1) + x, x[None].expand(4, -1, -1, -1)[1] + 0),
    "squeeze unsqueeze": lambda x, t, **_: (
        *(
            x.unsqueeze(0) + t,
            x.unsqueeze(-2) + 1,
            t[:1].squeeze(0) + x,
            x[:1, None].squeeze(-2) + 0,
            t[:1, :1].squeeze(0),
        ),
    ),
    "transpose permute": lambda x, t, **_: (
        *(t.transpose(0, 1) + x[:, None], t.transpose(-3, -2) * 2, t.permute(1, 0, 2) + 1),
        *(t[None].permute(2, 0, -3, 3) - 1, t.movedim(0, 1) + 1),
    ),
    "select": lambda x, t, **_: (x[0] + 0, x[-1] + 0, t[:, 1] + 0, t[1, -2] + 0, t.select(-2, -1) + 0),
    "slice": lambda x, t, **_: (
        *(
            x[1:] + 0,
            x[:-1] + 0,
            x[::2] + 0,
            x[1:3] + 0,
            x[-2:] + 0,
            t[:, 1::2] + 0,
            t[..., 1:, :] + 0,
            x[3:].sum(0) + x[0],
        ),
    ),
    "unbind split_with_sizes": lambda x, t, **_: (
        *(part + 0 for part in (*x.unbind(0), *t.unbind(1), *t.unbind(-2), *x.split([1, 2]), *t.split([2, 0, 1], -2))),
    ),
    "stack cat": lambda x, y, t, i, **_: (
        *(torch.stack((x, y)), torch.stack((x, y), 1), torch.stack((x, y), -2)),
        *(-torch.cat((x > 0, x)), torch.stack((x > 0, x)) * 2, torch.stack((i > 0, i)).sum(0)),
        *(torch.cat((x, y[:1])), torch.cat((t, t[:, :1]), 1), torch.cat((t, t), -2)),
        torch.stack((x[0], torch.zeros_like(x[0]), torch.ones_like(y[0]))),
    ),
    # without rules of their own: PyTorch knows simpler operators for them
    "": lambda x, y, t, i, positive, bad, **_: (
        *(x.mean(0), t.mean((0, 1)), x.norm(dim=0), torch.lerp(x, y, 0.3), x.sigmoid(), x.softmax(0), x.cumsum(0)),
        *(torch.nn.functional.softplus(x), torch.nn.functional.elu(x), torch.nn.functional.silu(x), x.relu()),
        *(torch.add(x, y, alpha=2), torch.sub(x, 1, alpha=3), bad.isinf(), bad.nan_to_num(), x.roll(1, 0), x.frac()),
        *(torch.addcmul(x, y, x, value=0.5), x.masked_fill(x > 0, 9.0), x.logsumexp(0), x.cross(y, 0), x.cumprod(0)),
        *(torch.logical_xor(x > 0, y > 0), torch.deg2rad(x), positive**3, positive**0.5, x.take_along_dim(i, 0)),
        *(torch.nn.functional.normalize(x, dim=0), x.diff(dim=0), (x > 0).count_nonzero(0), x.norm(p=1, dim=0)),
    ),
}


INPUTS = ("x", "y", "t", "positive", "bad", "i")


def inputs_of(n, dtype):
    """The tensors of INPUTS, see above."""
    g = torch.Generator().manual_seed(n)
    x, y, *t = (torch.randn(3, n, generator=g, dtype=dtype) for _ in range(4))
    bad = torch.tensor([NAN, INF, -INF, 0.1, -3.0], dtype=dtype).repeat(n)[: 3 * n].view(3, n)
    integers = torch.randint(3, (2, n), generator=g)
    return x, y, torch.stack(t), x.exp() + 0.1, bad, integers


def all_cases(*args):
    return tuple(case(**dict(zip(INPUTS, args, strict=True))) for case in CASES.values())


@functools.cache
def of_all_cases(dtype):
    """All cases as one function, compiled."""
    return compiled(all_cases, dtype)


@functools.cache
def all_results(n, dtype):
    return of_all_cases(dtype)(*inputs_of(n, dtype)), all_cases(*inputs_of(n, dtype))


class Used(dict):
    """Rules, and the names of those that were used."""

    def __init__(self, rules):
        super().__init__(rules)
        self.names = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)


def test_every_rule_has_a_case(monkeypatch):
    inputs, used = inputs_of(3, torch.float64), set()
    for names, case in CASES.items():
        with monkeypatch.context() as patch:
            tables = [Used(table) for table in (vecsim.RULES, vecsim.SIMPLER)]
            patch.setattr(vecsim, "RULES", tables[0])
            patch.setattr(vecsim, "SIMPLER", tables[1])
            record(lambda *args, case=case: case(**dict(zip(INPUTS, args, strict=True))), *inputs)
            assert (tables[0].names | tables[1].names).issuperset(names.split()), names
        used.update(names.split())
    assert used == vecsim.RULES.keys() | vecsim.SIMPLER.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("names", CASES)
def test_rules(names, n, dtype):
    ours, exact = (results[list(CASES).index(names)] for results in all_results(n, dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert len(ours) == len(exact) > 0
    for k, (a, b) in enumerate(zip(ours, exact, strict=True)):
        note = lambda text, k=k: f"result {k}: {text}"
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=note)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamp_keeps_nan(dtype):
    x = torch.tensor([[NAN, -2.0, 2.0]], dtype=dtype)
    result = compiled(lambda x: (x.clamp(-1, 1), x.clamp(min=-1), x.clamp(max=1)), dtype)(x)
    for y, least, most in zip(result, (-1, -1, -2), (1, 2, 1), strict=True):
        assert y[0].isnan().tolist() == [True, False, False] and y[0, 1:].tolist() == [least, most]


def changed_in_place(x):
    outside = x > 1.0
    outside |= x < -1.0
    outside &= x != 3.0
    outside ^= x > 0
    return outside.to(x.dtype)


def test_truths_change_in_place():
    x = torch.tensor([[-2.0, 0.5, 2.0, 3.0]], dtype=torch.float64)
    assert torch.equal(compiled(changed_in_place)(x), changed_in_place(x))


def test_a_mask_that_differs_between_robots_chooses_no_rows():
    with pytest.raises(NotImplementedError, match=r"a mask .* between robots: use torch.where"):
        compiled(lambda x: x[x[:, 0] > 0].sum(0))(torch.rand(2, 1, dtype=torch.float64))


def test_an_operator_without_a_rule_is_an_error_that_names_it():
    with pytest.raises(NotImplementedError, match="erf_inv"):
        compiled(lambda x: x.erfinv())(torch.rand(2, 3, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------------------
# Sine, cosine and tangent
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-7), (torch.float64, 1e-15)], ids=str)
@pytest.mark.parametrize("most", [4.0, 1e4])
def test_sine_cosine_and_tangent(dtype, tolerance, most):
    """The error of the tangent is relative to 1 + tan^2, its derivative."""
    multiples = torch.arange(-6000, 6001, dtype=torch.float64) * (math.pi / 4)
    multiples = multiples[multiples.abs() <= most]
    x = torch.cat((torch.linspace(-most, most, 100_003, dtype=torch.float64), multiples)).to(dtype)[None]
    *ours, tangent = compiled(lambda x: (x.sin(), x.cos(), x.tan()), dtype)(x)
    exact = x.double().numpy()
    for a, b in zip(ours, (np.sin(exact), np.cos(exact)), strict=True):
        assert np.abs(a.double().numpy() - b).max() <= tolerance and a.abs().max() <= 1 + tolerance
    away = np.abs(np.cos(exact)) > 1e-3
    wrong = (tangent.double().numpy() - np.tan(exact)) / (1 + np.tan(exact) ** 2)
    assert np.abs(wrong[away]).max() <= 2 * tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sine_of_what_is_not_finite_is_nan(dtype):
    x = torch.tensor([[NAN, INF, -INF, 0.0, 1.0]], dtype=dtype)
    for y in compiled(lambda x: (x.sin(), x.cos(), x.tan()), dtype)(x):
        assert y.isnan().tolist() == [[True, True, True, False, False]]


TRUTHS_OF = {  # functions of x, y (2, N) and of integers i (1, N)
    "exclusive or with a constant": lambda x, y, i: ((x > 0) ^ True, (x > 0) ^ False, i ^ True),
    "equal": lambda x, y, i: ((x > 0) == True, (x > 0) == False, (x > 0) == (y > 0), (x > 0) != True),  # noqa: E712
    "order": lambda x, y, i: ((x > 0) < (y > 0), (x > 0) >= (y > 0), (x > 0) <= True, (x > 0) > False),
    "truths among numbers": lambda x, y, i: ((x > 0) == y, (x > 0) > y, (x > 0) <= i, (x > 0) * y, (x > 0) + i),
    "where": lambda x, y, i: (
        *(torch.where(x > 0, True, False) ^ (y > 0), torch.where(x > 0, y > 0, False)),
        *(torch.where(x > 0, True, y > 0), torch.where((x > 0).amin(0), x, y)),
    ),
    "maximum and minimum": lambda x, y, i: (
        *(torch.maximum(x > 0, y > 0), torch.minimum(x > 0, y > 0), (x > 0).amin(0), (x > 0).amin(0, keepdim=True)),
        *(torch.maximum(x > 0, y > 0) ^ True, torch.minimum(x > 0, y > 0) & (x < 0.4)),
    ),
    "the opposite of a maximum": lambda x, y, i: (~torch.maximum(x > 0, y > 0), ~(x > 0).amin(0)),
    "sums and products": lambda x, y, i: (
        *((x > 0) + (y > 0), (x > 0) * (y > 0), ((x > 0) + (y > 0)) ^ True, ((x > 0) * (y > 0)) ^ True),
        *(((x > 0) + (y > 0)) & ((x > 0) * (y > 0)), ((x > 0) + (y > 0)).sum(0)),
    ),
    "truths of numbers": lambda x, y, i: (x.bool(), ~x.bool(), x.bool() & (y > 0), i.bool(), x.bool().sum(0)),
}


@pytest.mark.parametrize("case", TRUTHS_OF)
def test_truths_and_integers(case):
    """For all pairs of 0.5, -0.5, 0 and 1."""
    numbers = torch.tensor([0.5, -0.5, 0.0, 1.0], dtype=torch.float64)
    x, y = torch.cartesian_prod(numbers, numbers).T
    args = torch.stack((x, y)), torch.stack((y, x.roll(1))), (2 * x).long()[None].abs()
    function = TRUTHS_OF[case]
    for k, (ours, exact) in enumerate(zip(compiled(function)(*args), function(*args), strict=True)):
        assert torch.equal(ours, exact) and (ours.shape, ours.dtype) == (exact.shape, exact.dtype), f"result {k}"


def test_integers_are_not_inverted(own_cache):
    with pytest.raises(NotImplementedError, match="inverts truths only"):
        compiled(lambda i: ~i)(torch.zeros(1, 4, dtype=torch.int64))


# ----------------------------------------------------------------------------------------------------------------------
# Programs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def program():
    return vecsim.Program()


def number(program, row=0):
    return program.append("number", "load", 0, row)


def test_what_needs_no_operation(program):
    a, b = (number(program, row) for row in range(2))
    truth = program.apply("lt", a, b)
    negative, difference = program.apply("neg", a), program.apply("sub", a, b)
    count = len(program.operations)
    for name, *args, expected in (
        ("add", a, 0.0, a),
        ("add", 0, a, a),
        ("sub", a, 0.0, a),
        ("sub", 0.0, a, negative),
        ("mul", 0.0, a, 0.0),
        ("mul", a, 0, 0.0),
        ("mul", 1.0, a, a),
        ("mul", a, 1, a),
        ("mul", -1.0, a, negative),
        ("neg", negative, a),
        ("div", 0.0, a, 0.0),
        ("div", a, 1.0, a),
        ("div", a, -1.0, negative),
        ("max", a, -INF, a),
        ("min", a, INF, a),
        ("and", truth, True, truth),
        ("and", False, truth, False),
        ("or", truth, False, truth),
        ("or", True, truth, True),
        ("where", truth, a, a, a),
        ("where", truth, 2.0, 2.0, 2.0),
        ("where", True, a, b, a),
        ("where", False, a, b, b),
        ("sub", a, b, difference),  # equal operations are one
        ("lt", a, b, truth),
    ):
        result = program.apply(name, *args)
        assert type(result) is type(expected) and result == expected, (name, args)
    assert len(program.operations) == count


def test_constants_fold(program):
    for name, *args, expected in (
        ("add", 1, 2.0, 3.0),
        ("add", True, 1, 2),
        ("div", 1, 4, 0.25),
        ("div", -1.0, 0.0, -INF),
        ("sqrt", 4.0, 2.0),
        ("max", 1.0, 2.0, 2.0),
        ("min", 1.0, 2.0, 1.0),
        ("pow", 2.0, 3.0, 8.0),
        ("lt", 1.0, 2.0, True),
        ("not", True, False),
        ("where", True, 1.0, 2, 1.0),
        ("to_integer", 2.7, 2),
        ("to_number", 2, 2.0),
    ):
        result = program.apply(name, *args)
        assert type(result) is type(expected) and result == expected, (name, args)
    assert math.isnan(program.apply("sqrt", -1.0)) and math.isnan(program.apply("div", 0.0, 0.0))
    assert math.isnan(program.apply("max", NAN, 1.0)) and not program.operations


def test_operations_that_become_cheaper_or_equal_ones(program):
    a, b = (number(program, row) for row in range(2))
    assert program.apply("div", a, 4.0) == program.apply("mul", a, 0.25)
    assert program.apply("add", a, b) == program.apply("add", b, a)
    assert program.apply("mul", a, 2.0) == program.apply("mul", 2.0, a)
    assert program.apply("neg", program.apply("sub", a, b)) == program.apply("sub", b, a)
    assert program.apply("sub", a, b) != program.apply("sub", b, a)
    assert program.apply("div", a, 0.0) != program.apply("mul", a, 0.0)
    assert program.apply("where", program.apply("lt", a, b), 1, 1.0) == 1.0


def test_one_variable_for_equal_operations():
    recording = record(lambda x, y: (x * y + 1, y * x + 1, (x * y).sin()), torch.ones(1, 2), torch.ones(1, 2))
    assert recording.values[0].item() == recording.values[1].item() != recording.values[2].item()
    names = [name for _, name, _ in recording.program.operations]
    assert sorted(names) == ["add", "load", "load", "mul", "sin"]


def test_what_does_not_depend_on_an_input_is_a_constant():
    def function(x):
        table = torch.full((2, 1), 3.0, dtype=x.dtype).sqrt() ** 2
        return torch.cat((x[:0].sum(0)[None] + table, 0 * x))

    recording = record(function, torch.ones(1, 4, dtype=torch.float64))
    assert recording.values[0].flatten().tolist() == pytest.approx([3, 3, 0])
    assert not recording.program.needed(recording.values[0].flat)


def record(function, *args):
    base = small_model()
    return vecsim.Recording(function, base, args)


UNARY = {"neg": np.negative, "abs": np.abs, "sin": np.sin, "cos": np.cos}
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
BINARY |= {"hypot": np.hypot}
TRUTHS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
LOGIC = {"and": np.logical_and, "or": np.logical_or}
EXACT = UNARY | BINARY | TRUTHS | LOGIC | {"where": np.where, "not": np.logical_not}
EXACT |= {"div": lambda a, b: a / b, "sqrt": np.sqrt}


def random_tree(rng, depth, branches, truth=False):
    """A nested tuple: the name of an operation and its arguments; an input is its row, in brackets."""
    grow = lambda truth=False: random_tree(rng, depth - 1, branches, truth)
    if truth:
        if depth < 2 or rng.random() < 0.5:
            return rng.choice(list(TRUTHS)), random_tree(rng, 0, branches), grow()
        return ("not", grow(True)) if rng.random() < 0.3 else (rng.choice(list(LOGIC)), grow(True), grow(True))
    kind = rng.random()
    if depth <= 0 or kind < 0.1:
        return [rng.randrange(4)] if rng.random() < 0.6 else rng.choice([0.0, 1.0, -1.0, 0.5, -3.0])
    if kind < 0.3:
        return rng.choice(list(UNARY)), grow()
    if kind < 0.4:
        return "sqrt", ("abs", grow())
    if kind < 0.5:
        return "div", grow(), rng.choice([2.0, -4.0, ("max", 1.0, grow())])
    if kind < 0.65 and branches:
        return "where", grow(True), grow(), grow()
    return rng.choice(list(BINARY)), grow(), grow()


def evaluated(tree, inputs, apply):
    if isinstance(tree, list):
        return inputs[tree[0]]
    if not isinstance(tree, tuple):
        return tree
    name, *args = tree
    return apply(name, *(evaluated(x, inputs, apply) for x in args))


@pytest.mark.parametrize("branches, count, size", [(True, 100, INF), (False, 100, INF), (False, 20, 30)])
def test_random_expressions(branches, count, size):
    """In one kernel, or in kernels of 30 operations, which hand values over as on a GPU."""
    program, rng = vecsim.Program(), random.Random(5)
    trees = [random_tree(rng, 6, branches) for _ in range(count)]
    rows = [number(program, row) for row in range(4)]
    roots = [program.convert("number", evaluated(tree, rows, program.apply)) for tree in trees]
    assert sum(isinstance(root, vecsim.Value) for root in roots) > count / 2
    kernels, scratch = vecsim.write_kernels(program, {"y": roots}, size)
    rows_between = sum(scratch.values())
    assert len(kernels) == 1 and rows_between == 0 if size == INF else len(kernels) > 4 and rows_between > 4
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tensors = {"x0": x, "y": x.new_full((len(roots), 8), NAN), "s": x.new_full((scratch["s"], 8), NAN)}
    tensors["j"] = torch.full((scratch["j"], 8), -7)
    for kernel in kernels:
        run = vecsim.build_cpp(vecsim.cpp_source(kernel, x.dtype, 8))
        run(emulated_cuda.addresses([tensors[name] for name in kernel.tensors]))
    exact = [np.broadcast_to(evaluated(t, x.numpy(), lambda name, *args: EXACT[name](*args)), 8) for t in trees]
    np.testing.assert_allclose(tensors["y"].numpy(), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_kernels_end_where_fewest_rows_cross(seed, monkeypatch):
    """No other ends of kernels of at most five operations load and store fewer rows, launches included."""
    monkeypatch.setattr(vecsim, "LAUNCH", 3)
    program, rng = vecsim.Program(), random.Random(seed)
    values = [number(program, row) for row in range(3)]
    for _ in range(11):
        values.append(program.append("number", rng.choice(list(BINARY)), *rng.choices(values[-6:], k=2)))
    roots = values[-4:]
    count = sum(program.operations[v][1] != "load" for v in program.needed(roots))

    def cost(ends=None):
        with monkeypatch.context() as patch:
            if ends:
                patch.setattr(vecsim, "kernel_ends", lambda *_: ends)
            kernels, _ = vecsim.write_kernels(program, {"y": roots}, 5)
        rows = sum(line.count(" * n + i") for kernel in kernels for line in kernel.lines)
        return rows + vecsim.LAUNCH * len(kernels)

    choices = itertools.chain(*(itertools.combinations(range(1, count), k) for k in range(count)))
    costs = {cost([*inner, count]) for inner in choices if max(np.diff([0, *inner, count])) <= 5}
    assert cost() == min(costs) < max(costs)


# ----------------------------------------------------------------------------------------------------------------------
# Constants among the results of the physics
# ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def half_cheetah():
    m = vecsim.compile_mjcf(vecsim.build_task("HalfCheetah-v5", {}).source())
    return vecsim.load_model(m, dtype=torch.float64)


def random_state(model, n, seed=0, spread=0.5):
    """States on and in the ground."""
    g = torch.Generator().manual_seed(seed)
    noise = lambda rows: torch.randn(rows, n, generator=g, dtype=model.qpos0.dtype)
    qpos = model.qpos0 + spread * noise(model.nq)
    return vecsim.State(qpos, 3 * noise(model.nv), 10 * noise(model.nv)), noise(model.nu).clamp(-1, 1)


def tensors_of(tree):
    return [x for _, x in vecsim.named_tensors(tree, "")]


def test_known_values_of_a_plane_robot_hold_in_every_state():
    """Before and after Newton iterations."""
    model = half_cheetah()
    known = vecsim.known_values(model, vecsim.Changed({}))
    state, ctrl = random_state(model, 50)
    constants = 0
    begun = vecsim.begin_dynamics(model, state, ctrl)
    for dynamics in (begun, vecsim.forward(model, state, ctrl, 1), vecsim.forward(model, state, ctrl, 4)):
        for x, values in zip(tensors_of(dynamics), known, strict=True):
            assert values is not None and (*x.shape[:-1], 1) == values.shape
            rows = x.expand(*x.shape[:-1], 50).reshape(values.size, 50)
            for row, value in zip(rows, values.flat, strict=True):
                if not isinstance(value, vecsim.Value):
                    assert (row - value).abs().max() <= 1e-12
                    constants += 1
    assert constants > 3 * 300


def test_an_iteration_that_keeps_no_constant_leaves_the_solution_unknown(monkeypatch):
    model, iteration = half_cheetah(), vecsim.newton_iteration
    known = vecsim.known_values(model, vecsim.Changed({}))
    count = len(tensors_of(record_of(iteration, model).result))
    has_constants = [not all(isinstance(x, vecsim.Value) for x in values.flat) for values in known[-count:]]
    assert any(has_constants)

    def other(model, smooth, it):
        return tree_map_only(torch.Tensor, lambda x: x + 1, iteration(model, smooth, it))

    monkeypatch.setattr(vecsim, "newton_iteration", other)
    changed = vecsim.known_values(model, vecsim.Changed({}))
    assert changed[-count:] == [None] * count and len(changed) == len(known)
    for ours, theirs in zip(changed[:-count], known[:-count], strict=True):
        assert ours.tolist() == theirs.tolist()


def record_of(iteration, model):
    state, ctrl = random_state(model, 2)
    return vecsim.Recording(iteration, model, (vecsim.Changed({}), *vecsim.begin_dynamics(model, state, ctrl)))


# ----------------------------------------------------------------------------------------------------------------------
# Models and arguments
# ----------------------------------------------------------------------------------------------------------------------


def assert_same_dynamics(ours, exact, tolerance=1e-9):
    """What is the same for all robots may have one column in eager results."""
    for a, b in zip(tensors_of(ours), tensors_of(exact), strict=True):
        torch.testing.assert_close(a, b.expand_as(a), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def pendulum():
    """Its model and its compiled functions."""
    model = small_model()
    return model, vecsim.compile_regions(model)


def test_replaced_fields_are_honoured(pendulum):
    """For all robots alike, for each robot, and anew with other values."""
    model, run = pendulum
    state, ctrl = random_state(model, 6)
    plain = vecsim.forward(model, state, ctrl, 2)
    assert_same_dynamics(vecsim.forward(model, state, ctrl, 2, run), plain)
    per_robot = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    for factor in (torch.full((1,), 1.5, dtype=torch.float64), 3 * per_robot[:1], per_robot, per_robot.flip(0)):
        for name in ("mass", "actuator_gain"):
            other = dataclasses.replace(model, **{name: getattr(model, name) * factor})
            exact = vecsim.forward(other, state, ctrl, 2)
            assert (exact.solution.qacc - plain.solution.qacc).abs().max() > 1e-3
            assert_same_dynamics(vecsim.forward(other, state, ctrl, 2, run), exact)
    assert_same_dynamics(vecsim.forward(model, state, ctrl, 2, run), plain)


def test_two_replaced_fields_and_then_one(pendulum):
    model, run = pendulum
    state, ctrl = random_state(model, 6)
    factor = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    both = dict(inertia=model.inertia * factor, dof_damping=model.dof_damping + factor)
    for names in (("inertia", "dof_damping"), ("inertia",), ("dof_damping",)):
        other = dataclasses.replace(model, **{name: both[name] for name in names})
        assert_same_dynamics(run.begin_dynamics(other, state, ctrl), vecsim.begin_dynamics(other, state, ctrl))


def test_nested_fields_are_inputs_too(pendulum):
    model, run = pendulum
    state, ctrl = random_state(model, 6)
    state.qpos[0] = model.limit_bound[0] - 0.1
    softness = model.limit_softness._replace(stiffness=2 * model.limit_softness.stiffness)
    other = dataclasses.replace(model, limit_softness=softness)
    assert_same_dynamics(run.begin_dynamics(other, state, ctrl), vecsim.begin_dynamics(other, state, ctrl))


def test_numbers_of_another_model_are_not_those_of_the_first(pendulum):
    """What a code has as constants belongs to its key, or is refused."""
    model, _ = pendulum
    function = vecsim.CompiledFunction(lambda model, x: model.timestep * x, model)
    x = torch.ones(2, 5, dtype=torch.float64)
    for timestep in (model.timestep, 0.5, 0.25, 0.5):
        assert torch.equal(function(dataclasses.replace(model, timestep=timestep), x), timestep * x)


def test_numbers_among_the_arguments_are_constants_of_a_code():
    function = vecsim.CompiledFunction(lambda _, x, factor, flag: factor * x if flag else x, small_model())
    x = torch.ones(2, 5, dtype=torch.float64)
    for factor, flag in ((2.0, True), (3.0, True), (2.0, True), (2.0, False)):
        assert torch.equal(function(small_model(), x, factor, flag), factor * x if flag else x)
    assert len(function.codes) == 3


def test_numbers_within_tuples_are_constants_of_a_code():
    """And so is the length of a list."""
    function = vecsim.CompiledFunction(lambda _, pair: pair[0] * pair[1], small_model())
    x = torch.ones(2, 5, dtype=torch.float64)
    for factor in (2.0, 3.0, 2.0):
        assert torch.equal(function(small_model(), (x, factor)), factor * x)
    assert len(function.codes) == 2
    function = vecsim.CompiledFunction(lambda _, tensors: sum(tensors), small_model())
    for count in (1, 3, 2, 3):
        assert torch.equal(function(small_model(), [x] * count), count * x)
    assert len(function.codes) == 3


@pytest.mark.parametrize("sizes", [(0, 1, 0, 20), (20, 1, 0)])
def test_no_robots(sizes):
    """Nothing is the result; and code that is compiled for none is right for one."""
    function = lambda x, i: (x * 2, x.sum(0), x.gather(0, i), i + 1)
    ours = compiled(function)
    for n in sizes:
        x = torch.arange(3.0 * n, dtype=torch.float64).view(3, n)
        args = x, torch.ones(2, n, dtype=torch.int64)
        for a, b in zip(ours(*args), function(*args), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("integers_first", [True, False])
def test_integers_in_place_of_numbers(integers_first):
    """They are refused, or have a code of their own. The code for numbers is right in any case."""
    ours, x = compiled(lambda x: x * 2), torch.tensor([[0.5, -1.5, 3.0]], dtype=torch.float64)
    for y in (x.long(), x, x.long()) if integers_first else (x, x.long(), x):
        with contextlib.nullcontext() if y is x else contextlib.suppress(ValueError):
            assert torch.equal(ours(y).to(y.dtype), y * 2)


def test_any_strides():
    """Columns of a wider tensor, every second robot, transposed, expanded and of size 1."""
    wide = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    function = lambda x, y: (x.sin() + y, x[0] * y[1])
    ours = compiled(function)
    for x, y in (
        (wide[:3, 5:16], wide[3:, 7:18]),
        (wide[:3, ::2], wide[3:, 1::2]),
        (wide[:, :3].T, wide[:, 3:6].T),
        (wide[0].expand(3, -1), wide[:3]),
        (wide[:3], wide[:3, :1]),
        (wide[:3], wide[:3, :1].expand(-1, 40)),
        (wide[:3, :1], wide[3:, :1]),
        (wide[::2], wide[1::2]),
    ):
        for a, b in zip(ours(x, y), function(x, y), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_results_do_not_share_memory():
    x = torch.ones(2, 4, dtype=torch.float64)
    function = compiled(lambda x: (x, x + 1, x[:1]))
    first = function(x)
    second = function(x)
    for y in (*first, *second):
        y += 7
    assert torch.equal(x, torch.ones_like(x)) and torch.equal(first[0], x + 7) and torch.equal(second[1], x + 8)


@pytest.mark.parametrize("rows, robots", [(4, 5), (3, 4), (3, 6), (1, 5)])
def test_wrong_shapes_are_refused(rows, robots):
    x = torch.ones(3, 5, dtype=torch.float64)
    function = compiled(lambda x, y: x + y)
    function(x, x)
    with pytest.raises((RuntimeError, ValueError)):
        function(x, torch.ones(rows, robots, dtype=torch.float64))


def test_other_numbers_of_robots_and_their_codes():
    function = vecsim.CompiledFunction(lambda _, x: x * 2 + 1, small_model())
    for n in (*range(1, 40), 1000):
        x = torch.arange(3.0 * n, dtype=torch.float64).view(3, n)
        assert torch.equal(function(small_model(), x), x * 2 + 1)
    assert len(function.codes) <= 4  # registers of 1, 2, 4 and 8 robots


ROBOTS = {name: mjcf for name, (mjcf, _) in FEATURES.items()} | {f"random tree {k}": random_robot(k) for k in (0, 2, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROBOTS)
def test_all_features_of_the_physics_are_compiled(name, quickly_built):
    """Where they act or not; robots with balls, free joints, actuators of all kinds, limits and pairs.

    Newton's method converges. Before, the search along a direction with dry friction amplifies rounding."""
    m = converged(mujoco.MjModel.from_xml_string(ROBOTS[name]))
    state, ctrl = batch(visit(m, 24, stride=3))
    model = vecsim.load_model(m, dtype=torch.float64)
    run = vecsim.compile_regions(model)
    explicit = len(model.fluid_link_index) or len(model.tendon_moment) or model.actuated_tendons or model.gyroscopic
    for integrator in ("euler", "rk4") if explicit else ("euler", "implicitfast", "rk4"):
        ours, exact = (vecsim.step(model, state, ctrl, integrator, 10, *more) for more in ((run,), ()))
        for a, b in zip(tensors_of(ours), tensors_of(exact), strict=True):
            size = 1 + b.abs().amax() if b.numel() else 1
            torch.testing.assert_close(a, b.expand_as(a), rtol=0, atol=float(1e-8 * size), equal_nan=False)


# ----------------------------------------------------------------------------------------------------------------------
# The physics of a control step as one loop over the robots
# ----------------------------------------------------------------------------------------------------------------------

# Three balls on a rail that touch each other; the first one can leave the ground.
BALLS = """<mujoco><option timestep=".004"/><worldbody><geom type="plane" size="9 9 1"/>
  <body pos="0 0 .1"><joint name="x" type="slide" axis="1 0 0" damping=".1"/><joint type="slide" axis="0 0 1"/>
    <geom size=".1"/></body>
  <body pos=".1 0 .1"><joint type="slide" axis="1 0 0"/><geom size=".1"/></body>
  <body pos=".2 0 .1"><joint type="slide" axis="1 0 0" damping=".2"/><geom size=".1"/></body>
</worldbody><actuator>
  <position joint="x" kp="5" kv="1" ctrlrange="-1 1" ctrllimited="true"/></actuator></mujoco>"""
SPREADS = {"pendulum": 0.5, "balls": 0.05}  # of the positions
INTEGRATORS = "euler", "implicitfast", "rk4"


def new_balls(dtype):
    """They have three pairs and one slot, so they drop contacts."""
    return vecsim.load_model(mujoco.MjModel.from_xml_string(BALLS), dtype=dtype, pair_slots=1)


MODELS = {"pendulum": small_model, "balls": functools.cache(new_balls)}


def model_of(robot, dtype=torch.float64):
    return MODELS[robot](dtype)


@functools.cache
def functions_of(robot, dtype=torch.float64):
    return vecsim.compile_regions(model_of(robot, dtype))


def start_of(robot, n, controls=1, dtype=torch.float64):
    """A state, and a list of different controls."""
    model = model_of(robot, dtype)
    states = [random_state(model, n, seed, SPREADS[robot]) for seed in range(controls)]
    return states[0][0], [ctrl for _, ctrl in states]


def several_steps(model, integrator, iterations, state, ctrls, changed, run):
    """Physics steps of a model with changed fields. Returns the last state and dynamics, and what each step dropped."""
    model, dropped = dataclasses.replace(model, **changed), []
    for ctrl in ctrls:
        state, dynamics = vecsim.step(model, state, ctrl, integrator, iterations, run)
        dropped.append(dynamics.smooth.constraints.dropped)
    return state, dynamics, tuple(dropped)


CALLS = {}  # by the compiled functions, and by what is constant in a call


def calls_of(model, run, state, ctrls, integrator, iterations):
    """The `CompiledCalls` of several steps, and its arguments."""
    first = run.begin_dynamics
    args = state, ctrls, first.difference(model).fields
    key = id(run), integrator, iterations, repr(tree_map_only(torch.Tensor, lambda x: None, args))
    if key not in CALLS:
        steps = functools.partial(several_steps, first.base, integrator, iterations)
        CALLS[key] = vecsim.CompiledCalls(steps, run)
    return CALLS[key], args


def physics_of(model, run, *args):
    if run is vecsim.EAGER:
        state, ctrls, *how = args
        return several_steps(model, *how, state, ctrls, {}, run)
    calls, args = calls_of(model, run, *args)
    return calls(*args)


def assert_same_physics(model, run, *args, tolerance=1e-12):
    """The compiled state, dynamics and dropped contacts are the eager ones. Returns the compiled result."""
    found, right = (physics_of(model, functions, *args) for functions in (run, vecsim.EAGER))
    n = args[0].qpos.shape[1]
    for (name, ours), (same_name, exact) in zip(*(vecsim.named_tensors(x, "") for x in (found, right)), strict=True):
        assert (name, ours.dtype) == (same_name, exact.dtype) and ours.shape == (*exact.shape[:-1], n)
        wrong = (ours - exact).abs() / (1 + exact.abs())  # what is the same for all robots may be (..., 1)
        assert (wrong <= tolerance).all(), name
    return found


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("robot", SPREADS)
def test_the_loop_computes_what_eager_pytorch_does(robot, integrator):
    """With different controls, and with one tensor several times."""
    model, run = model_of(robot), functions_of(robot)
    for n in SIZES:
        state, ctrls = start_of(robot, n, 5)
        for given in (ctrls[:1], ctrls[:2], ctrls, ctrls[:1] * 2, ctrls[:1] * 5):
            _, dynamics, dropped = assert_same_physics(model, run, state, given, integrator, 2)
            assert len(dropped) == len(given)
    active = vecsim.active_weights(dynamics.smooth.constraints, dynamics.solution)
    if robot == "pendulum":
        assert (active.limit > 0).any()
    else:
        assert (active.contact > 0).any() and (active.pair > 0).any() and all((x > 0).any() for x in dropped)


@pytest.mark.parametrize("robot, tolerance", [("pendulum", 1e-4), ("balls", 2e-3)])
def test_the_loop_in_single_precision(robot, tolerance):
    """There numbers and integers differ in size."""
    model, run = model_of(robot, torch.float32), functions_of(robot, torch.float32)
    for n in SIZES:
        state, ctrls = start_of(robot, n, 2, torch.float32)
        for integrator in INTEGRATORS[:2]:
            assert_same_physics(model, run, state, ctrls, integrator, 2, tolerance=tolerance)


def test_the_loop_for_other_numbers_of_iterations_and_the_integrator_of_the_model():
    model, run = model_of("balls"), functions_of("balls")
    state, ctrls = start_of("balls", 5, 2)
    results = [assert_same_physics(model, run, state, ctrls, "mjcf", count) for count in (1, 4, 1)]
    first, other, again = (dynamics.solution.qacc for _, dynamics, _ in results)
    assert torch.equal(first, again) and (first - other).abs().max() > 1e-3


@pytest.mark.parametrize("robot", SPREADS)
def test_the_loop_honours_replaced_fields(robot):
    """For all robots alike, for each robot, and anew with other values; also what is no tensor."""
    model, run = model_of(robot), functions_of(robot)
    state, ctrls = start_of(robot, 6, 2)
    plain = assert_same_physics(model, run, state, ctrls, "euler", 2)
    per_robot = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    changes = [
        {name: getattr(model, name) * factor}
        for name in ("mass", "actuator_gain")
        for factor in (1.5 * torch.ones_like(per_robot[:1]), 5 * per_robot[:1], per_robot, per_robot.flip(0))
    ]
    changes += [{"timestep": 0.002}, {"timestep": 0.003}]
    changes += [{"mass": model.mass * per_robot, "dof_damping": model.dof_damping + 0.1}]
    results = [plain]
    for change in changes:
        other = dataclasses.replace(model, **change)
        results.append(assert_same_physics(other, run, state, ctrls, "euler", 2))
    qvels = [state.qvel for state, _, _ in results]
    assert all((a - b).abs().max() > 1e-6 for a, b in itertools.combinations(qvels, 2))
    assert_same_physics(model, run, state, ctrls, "euler", 2)


def test_the_loop_reads_any_strides():
    """Transposed tensors, a control that is the same for all robots, and one tensor as velocity and warm start."""
    model, run = model_of("pendulum"), functions_of("pendulum")
    (qpos, qvel, _), ctrls = start_of("pendulum", 20, 2)
    state = vecsim.State(qpos.T.contiguous().T, qvel, qvel)
    assert not state.qpos.is_contiguous()
    assert_same_physics(model, run, state, [ctrls[0][:, :1], ctrls[1][:, :1].expand(-1, 20)], "euler", 2)


def test_results_of_the_loop_do_not_share_memory():
    """Neither with each other, nor with inputs, nor with another call's."""
    model, run = model_of("balls"), functions_of("balls")
    given = *start_of("balls", 5, 2), "euler", 2
    inputs = [x.clone() for x in tensors_of(given)]
    first = tensors_of(physics_of(model, run, *given))
    before = [x.clone() for x in first]
    second = tensors_of(physics_of(model, run, *given))
    assert all(map(torch.equal, first, second))
    for x in second:
        x.fill_(7)
    assert all(map(torch.equal, first, before)) and all(map(torch.equal, tensors_of(given), inputs))
    for k, x in enumerate(first):
        x.fill_(k)
    assert all((x == k).all() for k, x in enumerate(first))


@contextlib.contextmanager
def forgetful(monkeypatch):
    """torch.empty, whose memory may hold old results that are right, gives NaN and -1."""
    empty = torch.empty

    def filled(*size, **kind):
        x = empty(*size, **kind)
        return x.fill_(NAN) if x.is_floating_point() else x.view(torch.uint8).fill_(255).view(x.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", filled)
        yield patch


# Functions that are wrong if their results lie where their arguments do: rows are stored while others wait.
TURNS = (
    lambda _, x, y, i: torch.stack((x[1] + y[2], x[2] - 0.5 * y[0], 0.5 * x[0] + y[1])).sin(),
    lambda _, x, y, i: (
        torch.stack((x[2] * y[1], x[0] + y[2], x[1] - y[0])).cos(),
        x[:1] + 1,
        torch.stack((i[1], 1 - i[0])),
    ),
    lambda _, x, y, i: (x.gather(0, (i + 1) & 1), torch.stack((i[1] + i[0], 1 - i[0]))),
)


@functools.cache
def turns():
    return [vecsim.CompiledFunction(function, small_model()) for function in TURNS]


def calls_at_random(seed, call, inputs):
    """Make 12 calls of functions on what others returned. The results are some of all that they returned."""
    rng, known = random.Random(seed), {"x": [*inputs[:2]], "i": [inputs[2]], "rest": []}
    for _ in range(12):
        result = call(
            rng.randrange(len(TURNS)), rng.choice(known["x"][-3:]), known["x"][-1], rng.choice(known["i"][-2:])
        )
        for _, x in vecsim.named_tensors(result, ""):
            name = "i" if x.dtype == torch.int64 else "x" if len(x) == 3 else "rest"
            known[name].append(x)
    found = [*itertools.chain(*known.values())]
    return tuple(rng.sample(found, 6)), known["x"][-1], tuple(rng.sample(known["i"], 2))


def assert_same_calls(seed, n):
    """A `Loop` makes calls at random, and eager PyTorch does."""
    calls, robots, model = [], min(8, 1 << n.bit_length() - 1), small_model()
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 3, n, generator=g, dtype=torch.float64)
    inputs = x, y, torch.randint(2, (2, n), generator=g)

    def traced(k, *args):
        result = tree_map_only(torch.Tensor, torch.clone, TURNS[k](model, *args))
        args = turns()[k].without_models((model, *args))
        code = turns()[k].compile(args, robots)
        calls.append((code, code.interface.inputs(args), tensors_of(result)))
        return result

    one_robot = [x[:, :1].clone() for x in inputs]
    result = calls_at_random(seed, traced, one_robot)
    loop = vecsim.Loop(calls, list(vecsim.named_tensors(one_robot, "args")), result, torch.float64, robots)
    right = calls_at_random(seed, lambda k, *args: TURNS[k](model, *args), inputs)
    for a, b in zip(tensors_of(loop(inputs, n)), tensors_of(right), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n", SIZES)
def test_calls_that_hand_tensors_to_each_other(n):
    for seed in range(20):
        assert_same_calls(seed, n)


def try_the_loop():
    """What the faults below must fail: the balls, whose functions have several results, also integers; other calls."""
    for integrator, count in (("euler", 2), ("rk4", 1)):
        run = vecsim.compile_regions(model_of("balls"))
        assert_same_physics(model_of("balls"), run, *start_of("balls", 33, count), integrator, 3)
    for seed in range(10):
        assert_same_calls(seed, 33)


FAULTS_OF_THE_LOOP = {  # a piece of the source of Loop, its method, and what replaces the piece
    "memory is freed one call too early": ("__init__", "ending.pop(k, ())", "ending.pop(k + 1, ())"),
    "memory that is needed longest is freed at once": ("__init__", "ending.pop(k, ())", "ending.pop(max(ending))"),
    "new memory begins where all begins": ("__init__", "start, self.bytes = self.bytes,", "start, self.bytes = 0,"),
    "results are in the wrong rows": ("__init__", "robots * size * x.numel()\n", "robots * size * x.shape[0]\n"),
    "results are stored in the wrong order": (
        "__init__",
        "itertools.accumulate(rows, initial=0)",
        "itertools.accumulate(rows[::-1], initial=0)",
    ),
    "two results have the same place": ("__init__", "itertools.accumulate(rows, initial=0)", "itertools.repeat(0)"),
}
FAULTS_OF_CPP = {  # a piece of CPU_LOOP, and what replaces it
    "the last block is left out": ("start < end * ROBOTS;", "start < end * ROBOTS && start + ROBOTS <= n;"),
    "the first robot is left out": ("start = first_block * ROBOTS;", "start = first_block * ROBOTS + (n > 1);"),
    "the last block is shifted": ("n - ROBOTS;", "n - ROBOTS - (n > ROBOTS);"),
    "a wrong row is loaded": ("(row * n + i)", "((IN ? x.rows - 1 - row : row) * n + i)"),
    "a wrong row is stored": ("(row * n + i)", "((IN ? row : x.rows - 1 - row) * n + i)"),
    "the last call is left out": ("k < calls;", "k < calls - 1;"),
    "calls are made in the wrong order": (
        "functions[k](pointers + first[k])", "functions[calls - 1 - k](pointers + first[calls - 1 - k])"),
}  # fmt: skip


def test_the_loop_without_a_fault(monkeypatch):
    with forgetful(monkeypatch):
        try_the_loop()


@pytest.mark.parametrize("fault", [*FAULTS_OF_THE_LOOP, *FAULTS_OF_CPP])
def test_the_loop_shows_the_fault(fault, monkeypatch):
    with forgetful(monkeypatch) as patch:
        if fault in FAULTS_OF_CPP:
            right, wrong = FAULTS_OF_CPP[fault]
            assert vecsim.CPU_LOOP.count(right) == 1
            patch.setattr(vecsim, "CPU_LOOP", vecsim.CPU_LOOP.replace(right, wrong))
        else:
            name, right, wrong = FAULTS_OF_THE_LOOP[fault]
            patch.setattr(vecsim.Loop, name, broken(vecsim.Loop, name, right, wrong))
        with pytest.raises(AssertionError):
            try_the_loop()


def test_memory_of_a_block_is_used_again():
    """Another control needs memory for itself and for the integers that its functions return, also what it dropped."""
    model, run = model_of("balls"), functions_of("balls")
    sizes = {}
    for count in (3, 4, 5):
        calls, args = calls_of(model, run, *start_of("balls", 33, count), "euler", 2)
        robots = run.begin_dynamics.robots(33)
        sizes[count] = calls.loop(args, robots).bytes
    functions = run.begin_dynamics, run.newton_iteration, run.newton_iteration, run.advance
    integers = sum(next(iter(function.codes.values())).interface.rows[1] for function in functions)
    needed = 8 * robots * (model.nu + integers)
    assert 0 < sizes[4] - sizes[3] <= needed and sizes[5] - sizes[4] <= needed


def test_threads_that_share_the_blocks(monkeypatch):
    """Any number of them computes the same bits. Little work has one thread."""
    model, run, runs = model_of("balls"), functions_of("balls"), []
    for n in (1, 16, 33, 500):
        state, ctrls = start_of("balls", n, 2)
        alone = tensors_of(physics_of(model, run, state, ctrls, "euler", 2))
        calls, _ = calls_of(model, run, state, ctrls, "euler", 2)
        monkeypatch.setattr(calls, "threads", 3)
        for share, most in ((10**9, 1), (1, 3)):
            monkeypatch.setattr(vecsim, "SHARE", share)
            for loop in calls.loops.values():
                plain = vecsim.build_cpp(vecsim.CPU_LOOP.format(robots=loop.robots))
                monkeypatch.setattr(loop, "run", lambda *words, plain=plain: (runs.append(words), plain(*words)))
            runs.clear()
            shared = tensors_of(physics_of(model, run, state, ctrls, "euler", 2))
            assert len(runs) == most
            assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
        monkeypatch.setattr(calls, "threads", 1)


def test_threads_that_call_the_loop_at_once():
    """With different numbers of robots. The first calls compile; each size of register once."""
    model, run = model_of("balls"), vecsim.compile_regions(model_of("balls"))
    start, sizes = threading.Barrier(2), ((33, 1, 500), (16, 3, 700))
    right = {
        n: tensors_of(physics_of(model, vecsim.EAGER, *start_of("balls", n, 2), "euler", 2))
        for n in itertools.chain(*sizes)
    }

    def work(sizes):
        given = [(n, *start_of("balls", n, 2)) for n in sizes]
        start.wait()
        wrong = []
        for n, state, ctrls in given * 30:
            ours = tensors_of(physics_of(model, run, state, ctrls, "euler", 2))
            wrong += [float(((a - b).abs() / (1 + b.abs())).sum()) for a, b in zip(ours, right[n], strict=True)]
        return max(wrong)

    with ThreadPoolExecutor(2) as pool:
        assert max(pool.map(work, sizes)) <= 1e-10
    assert len(calls_of(model, run, *start_of("balls", 33, 2), "euler", 2)[0].loops) == 3


@pytest.mark.parametrize("sizes", [(0, 1, 0, 20), (20, 1, 0)])
def test_no_robots_in_the_loop(sizes):
    """Nothing is the result; and what is compiled for none is right for one."""
    model, run = model_of("balls"), vecsim.compile_regions(model_of("balls"))
    for n in sizes:
        assert_same_physics(model, run, *start_of("balls", n, 2), "euler", 2)


def test_a_model_that_was_changed_in_place_is_refused():
    model = new_balls(torch.float64)
    run = vecsim.compile_regions(model)
    state, ctrls = start_of("balls", 5)
    assert_same_physics(model, run, state, ctrls, "euler", 2)
    model.gravity.mul_(2)
    calls = (
        lambda: physics_of(model, run, state, ctrls, "euler", 2),
        lambda: physics_of(dataclasses.replace(model, mass=2 * model.mass), run, state, ctrls, "euler", 2),
        lambda: run.begin_dynamics(model, state, ctrls[0]),
    )
    for call in calls:
        with pytest.raises(ValueError, match="the compiled model was changed in place; use dataclasses.replace"):
            call()


def test_a_replaced_terrain_is_refused():
    model, run = model_of("pendulum"), functions_of("pendulum")
    state, ctrls = start_of("pendulum", 5)
    zeros = functools.partial(torch.zeros, dtype=torch.float64)
    flat = vecsim.Terrain(zeros(3, 3), 1.0, (0.0, 0.0), zeros(1, 3))
    with_terrain = dataclasses.replace(model, terrain=flat)
    raised = dataclasses.replace(model, terrain=flat._replace(heights=flat.heights + 1))
    for functions, other in ((run, with_terrain), (vecsim.compile_regions(with_terrain), raised)):
        for call in (
            lambda: physics_of(other, functions, state, ctrls, "euler", 2),
            lambda: functions.begin_dynamics(other, state, ctrls[0]),
        ):
            with pytest.raises(ValueError, match="compiled for another model, which differs in terrain"):
                call()


WRONG = {  # tensors that are refused, and what the message says
    "integers": (lambda x: x.long(), "not for .* of torch.int64"),
    "another precision": (lambda x: x.float(), "not .*of torch.float32"),
    "another device": (lambda x: x.to("meta"), "not .*on meta"),
    "gradients": (lambda x: x.clone().requires_grad_(), r"compiled code has no gradients; use torch.no_grad\(\)"),
}


@pytest.mark.parametrize(
    "kind, compiled_before",  # integers that come first are compiled as such
    [pair for pair in itertools.product(WRONG, (True, False)) if pair != ("integers", False)],
)
def test_wrong_tensors_are_refused(kind, compiled_before):
    """Whichever tensor it is. Then right ones are computed as ever."""
    (change, message), model = WRONG[kind], model_of("pendulum")
    run = functions_of("pendulum")
    state, ctrls = start_of("pendulum", 5, 2)
    for name in ("qpos", "qvel", "warmstart", "ctrl"):
        run = run if compiled_before else vecsim.compile_regions(model)
        right = lambda: assert_same_physics(model, run, state, ctrls, "euler", 2)
        if compiled_before:
            right()
        if name == "ctrl":
            given = state, [ctrls[0], change(ctrls[1])]
        else:
            given = state._replace(**{name: change(getattr(state, name))}), ctrls
        with pytest.raises(ValueError, match=message):
            physics_of(model, run, *given, "euler", 2)
        right()


def test_tensors_with_gradients_are_allowed_where_none_are_computed():
    model, run = model_of("pendulum"), functions_of("pendulum")
    state, ctrls = start_of("pendulum", 5)
    state = state._replace(qvel=state.qvel.requires_grad_())
    with torch.no_grad():
        result = assert_same_physics(model, run, state, ctrls, "euler", 2)
    assert not any(x.requires_grad for x in tensors_of(result))


# ----------------------------------------------------------------------------------------------------------------------
# The compiler of C++, its cache, and threads
# ----------------------------------------------------------------------------------------------------------------------


def test_code_is_compiled_once_and_then_read_from_the_disk(own_cache):
    x, double = torch.ones(1, 8, dtype=torch.float64), lambda x: 2 * x + 1
    assert torch.equal(compiled(double)(x), double(x)) and len(own_cache) == 2  # the function and the loop over blocks
    assert torch.equal(compiled(double)(x), double(x)) and len(own_cache) == 2
    assert torch.equal(compiled(lambda x: 3 * x + 1)(x), 3 * x + 1) and len(own_cache) == 3
    assert compiled(double, torch.float32)(x.float()).dtype == torch.float32 and len(own_cache) == 4


def test_a_compiler_that_fails(own_cache, monkeypatch):
    """Nothing of it stays in the cache."""
    x, function = torch.ones(1, 8, dtype=torch.float64), compiled(lambda x: 2 * x)
    monkeypatch.setenv("CXX", "false")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="false failed"):
            function(x)
    assert len(own_cache) == 2
    monkeypatch.delenv("CXX")
    assert torch.equal(function(x), 2 * x) and {command[0] for command in own_cache[2:]} == {"g++"}


@pytest.mark.parametrize("content", [b"", b"half a library"])
def test_a_damaged_library_is_built_again(content, own_cache, monkeypatch, tmp_path):
    """As a crash may leave it. In another folder, because a process keeps what it has loaded from a path."""
    x, double = torch.ones(1, 8, dtype=torch.float64), lambda x: 2 * x
    assert torch.equal(compiled(double)(x), 2 * x) and len(own_cache) == 2
    names = [library.name for library in (tmp_path / "cache" / "vecsim").glob("*.so")]
    folder = tmp_path / "other" / "vecsim"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(content)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder.parent))
    for _ in range(2):
        assert torch.equal(compiled(double)(x), 2 * x) and len(own_cache) == 4
    assert len(names) == 2 and all((folder / name).stat().st_size > 100 for name in names)


class Nvrtc:
    """Stands in for NVRTC: the machine code of a source is its length, and an empty source is an error."""

    def __init__(self, version):
        self.version, self.sources = version, []

    def nvrtcVersion(self, *places):
        for place, number in zip(places, self.version, strict=True):
            place._obj.value = number

    def nvrtcCreateProgram(self, program, source, *_):
        self.sources.append(source)

    def nvrtcCompileProgram(self, program, count, flags):
        self.answer = b"cubin\0%d %s" % (len(self.sources[-1]), flags[0]) if self.sources[-1] else b"nothing to compile"
        return int(not self.sources[-1])

    def nvrtcGetCUBINSize(self, program, size):
        size._obj.value = len(self.answer)

    def nvrtcGetCUBIN(self, program, answer):
        answer.raw = self.answer

    nvrtcGetProgramLogSize, nvrtcGetProgramLog = nvrtcGetCUBINSize, nvrtcGetCUBIN
    nvrtcDestroyProgram = lambda self, program: None


def test_kernels_are_compiled_once_and_then_read_from_the_disk(monkeypatch, tmp_path):
    """For each source, GPU and version of NVRTC. Nothing of what failed stays."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hopper, blackwell = (9, 0), (10, 0)

    def compiles(version, source, capability, answer):
        library = Nvrtc(version)
        monkeypatch.setattr(torch.cuda._utils, "_get_nvrtc_library", lambda: library)
        assert vecsim.nvrtc(source, capability) == answer
        return len(library.sources)

    assert compiles((13, 0), "two", hopper, b"cubin\x003 --gpu-architecture=sm_90") == 1
    assert compiles((13, 0), "two", hopper, b"cubin\x003 --gpu-architecture=sm_90") == 0
    assert compiles((13, 0), "four", hopper, b"cubin\x004 --gpu-architecture=sm_90") == 1
    assert compiles((13, 0), "two", blackwell, b"cubin\x003 --gpu-architecture=sm_100") == 1
    assert compiles((13, 1), "two", hopper, b"cubin\x003 --gpu-architecture=sm_90") == 1
    files = list((tmp_path / "vecsim").iterdir())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="NVRTC failed: nothing to compile"):
            compiles((13, 0), "", hopper, b"")
    assert len(files) == 4 and set((tmp_path / "vecsim").iterdir()) == set(files)
    for damage in (b"", files[0].read_bytes()[:-1], bytes(99)):
        for file in files:
            file.write_bytes(damage)
        assert compiles((13, 0), "two", hopper, b"cubin\x003 --gpu-architecture=sm_90") == 1


def test_an_empty_name_of_the_compiler_means_gcc(own_cache, monkeypatch):
    monkeypatch.setenv("CXX", "")
    x = torch.ones(1, 8, dtype=torch.float64)
    assert torch.equal(compiled(lambda x: x - 2)(x), x - 2)
    assert {command[0] for command in own_cache} == {"g++"}


def test_a_compiler_that_may_not_be_executed(own_cache, monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o644)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(vecsim.InputError, match=r"compiler cannot be executed; .*name a C\+\+ compiler in \$CXX"):
        compiled(lambda x: 2 * x)(torch.ones(1, 8, dtype=torch.float64))


def test_a_compiler_that_is_not_there(own_cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(vecsim.InputError, match=r"no-such-compiler cannot be executed; .*--no-compile"):
        compiled(lambda x: 2 * x)(torch.ones(1, 8, dtype=torch.float64))
    with pytest.raises(vecsim.InputError, match="no-such-compiler cannot be executed"):
        vecsim.make("InvertedPendulum-v5", 1, compile=True)  # before anything is compiled


REFUSED = {  # what a function does with x (2, 3, N) and i (2, N), and what the message says
    "indexes the second axis": (lambda x, i: x[:, i], "what differs between robots can only index the first axis"),
    "indexes two axes": (lambda x, i: x[i, i], "what differs between robots can only index the first axis"),
    "adds at an index": (lambda x, i: x.index_put((ROWS % 2,), x, accumulate=True), "use torch.index_add"),
    "writes at an index of robots": (lambda x, i: x[0].index_put((i[0],), x[0, 0, 0]), "can only index the first axis"),
    "reads the bits of a constant": (
        lambda x, i: torch.cat((x, torch.zeros_like(x))).view(torch.int64),
        "bits of numbers only",
    ),
    "writes at an index": (lambda x, i: x.index_copy(0, i[:, 0], x), "what differs between robots can only index"),
    "draws": (
        lambda x, i: x + torch.rand(2, 3, 1),
        "random numbers would be drawn once for all steps: use the task's random_rows",
    ),
    "draws like its argument": (lambda x, i: x + torch.randn_like(x), "would be drawn once for all"),
    "makes a number": (lambda x, i: x * x[0, 0, 0].item(), "item: compiled code has no numbers of Python"),
    "makes an array": (lambda x, i: x + float(x.numpy().mean()), "numpy: compiled code has no numbers of Python"),
    "computes in another precision": (lambda x, i: (x.half() + 1).double(), "computes in torch.float64, not in torch"),
    "has an operator without a rule": (
        lambda x, i: x.cummax(0).values,
        "no rule for aten.cummax.*(?s:.)*accepts all operators",
    ),
    "fills its argument": (
        lambda x, i: x.zero_(),
        "a task changed an argument of its method in place: clone it before",
    ),
    "changes its argument": (
        lambda x, i: x.mul_(2),
        "a task changed an argument of its method in place: clone it before",
    ),
    "asks for a value": (
        lambda x, i: x if x[0, 0, 0] > 0 else 2 * x,
        "__bool__: compiled code has no numbers of Python",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_compiled_code_cannot_do_is_refused(case, own_cache):
    function, message = REFUSED[case]
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
        compiled(function)(torch.ones(2, 3, 8, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.int64))
    assert not own_cache


def test_a_result_of_another_precision_is_refused(own_cache):
    x, wide = torch.ones(2, 8), torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"returns torch.float32, .* but result\[1\]\['y'\] is torch.float64"):
        compiled(lambda x: (x, {"y": x * wide}), torch.float32)(x)
    assert not own_cache


def test_integers_have_as_many_bits_as_numbers(own_cache):
    i = torch.tensor([[3, -4]])
    with pytest.raises(NotImplementedError, match="integers of 32 bits, but a task uses 3000000000"):
        compiled(lambda i: i + 3_000_000_000, torch.float32)(i)
    assert torch.equal(compiled(lambda i: i + 3_000_000_000)(i), i + 3_000_000_000)


def test_an_exact_program_divides_and_keeps_what_is_not_finite():
    """As a task may expect. The physics is faster."""
    x = torch.arange(1.0, 4000)[None]
    bad = torch.tensor([[NAN, INF, -INF, 1.0]])
    cases = (
        (lambda x: (x / 41, (x / 41).floor(), (x / 47).long(), x // 41, x % 41, 1 / (x / 0.1)), x),
        (lambda i: (i // 41, i % 41, (i + 20_000_000) % 1000, -i // 7, -i % 7, i // -7, i % -7), x.long()),
        (lambda x: (x * 0, 0 / x, x % INF, (torch.eye(2) @ x.expand(2, -1)), x.sin(), (x * 1e9).cos()), bad),
    )
    for function, given in cases:
        base = small_model(torch.float32)
        code = vecsim.Code(
            vecsim.Recording(function, base, (given[:, :1],), exact=True), torch.float32, base.gravity.device, 1
        )
        for ours, exact in zip(code((given,), given.shape[1]), function(given), strict=True):
            torch.testing.assert_close(
                ours, exact, rtol=1e-6 * (given is bad), atol=1e-6 * (given is bad), equal_nan=True
            )


def test_tensors_that_a_function_changes_in_place():
    """Its own ones, also through views."""

    def function(x):
        y = torch.zeros_like(x)
        y[1:] = x[:-1]
        y[0] = 3.0
        y += x
        y[:, None][1].mul_(2)
        z = x.clone()
        z.clamp_(-0.5, 0.5)[0].fill_(7.0)
        return y, z, z.sum(0).add_(1)

    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ours, exact in zip(compiled(function)(x), function(x), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-14, atol=1e-14)


def test_trees_of_all_kinds():
    """Dicts, lists and tuples of numbers, integers and truths, as arguments and as results; a tensor twice."""

    def function(given, pair):
        x, i, flag = given["x"], pair[0], pair[1]["flag"]
        both = torch.where(flag, x, -x)
        return {"both": both, "again": both}, [i + 1, (flag & (x[0] > 0), ~flag)], flag, x.new_zeros(0, x.shape[1])

    for n in SIZES:
        g = torch.Generator().manual_seed(n)
        x, i = torch.randn(2, n, generator=g, dtype=torch.float64), torch.randint(9, (2, n), generator=g)
        args = {"x": x}, [i, {"flag": x[1] > 0.2}]
        ours, exact = (vecsim.named_tensors(f(*args), "") for f in (compiled(function), function))
        assert [name for name, _ in ours] == [name for name, _ in exact] and len(ours) == 7
        assert all(a.dtype == b.dtype and torch.equal(a, b) for (_, a), (_, b) in zip(ours, exact, strict=True))


def test_the_compiler_is_cxx(own_cache, monkeypatch, tmp_path):
    wrapper = tmp_path / "my compiler"
    wrapper.write_text('#!/bin/sh\nexec g++ "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{wrapper}' -v")
    x = torch.ones(1, 8, dtype=torch.float64)
    assert torch.equal(compiled(lambda x: x - 2)(x), x - 2)
    assert {command[0] for command in own_cache} == {str(wrapper)}


def test_threads_that_call_at_once(own_cache):
    """The first calls compile; each size of register once."""
    function = vecsim.CompiledFunction(lambda _, x, y: (x.sin() * y).sum(0), small_model())
    start, sizes = threading.Barrier(4), (3, 16, 5000, 7)

    def work(seed):
        g = torch.Generator().manual_seed(seed)
        start.wait()
        wrong = []
        for n in itertools.chain(*(sizes for _ in range(50))):
            x, y = torch.randn(2, 3, n, generator=g, dtype=torch.float64)
            wrong.append((function(small_model(), x, y) - (x.sin() * y).sum(0)).abs().max().item())
        return max(wrong)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) <= 1e-13
    assert len(own_cache) == 2 * len(function.codes) <= 6  # with a loop over blocks of each size
