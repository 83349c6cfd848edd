"""What the table of cases cannot see of the operators: memory, rows far apart, what is promised of odd rows."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import draw, guarded, loss_and_grad, truncates, upstream_for
from conftest import EMULATED, HAS_CUDA, skip_unless_available
from failures import EPS, VIEWS, judge

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends

Place = tuple[str, str]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("check", [False, True])
def test_r35_targets_outside_where_the_kernel_looks(monkeypatch: pytest.MonkeyPatch, check: bool, backend: str) -> None:
    """As on a GPU: the row becomes NaN without a synchronisation; LABELSMOOTH_CHECK_TARGETS=1 makes it raise."""
    skip_unless_available(backend)
    if backend == "triton":
        logits = importlib.import_module("labelsmooth_kernels.triton_kernels.logits")
        monkeypatch.setattr(logits, "_check_classes", lambda *_: None)
    monkeypatch.setenv("LABELSMOOTH_CHECK_TARGETS", "1" if check else "0")
    place = (backend, "cuda" if HAS_CUDA else "cpu")
    x, y = draw(place)
    good, good_grad = loss_and_grad(place, x, y, reduction="none", label_smoothing=EPS)
    for bad in (37, -1, 2**31 + 5, 2**32 + 5):
        y[4] = bad
        x_guarded, unharmed = guarded(x)
        if check:
            with pytest.raises(IndexError, match=rf"{bad} in row 4"):
                loss_and_grad(place, x_guarded, y, reduction="none", label_smoothing=EPS)
            continue
        loss, grad = loss_and_grad(place, x_guarded, y, reduction="none", label_smoothing=EPS)
        unharmed()
        others = torch.arange(6, device=x.device) != 4
        assert loss[4].isnan()
        assert grad[4].isnan().all()
        assert torch.equal(loss[others], good[others])
        torch.testing.assert_close(grad[others], good_grad[others])


@pytest.mark.skipif(HAS_CUDA, reason="memory that is not touched costs nothing on a CPU only")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("strides", [(2**31 + 5, 1), (1, 2**27 + 1)], ids=["rows", "classes"])
def test_r12_r13_elements_2_31_apart(fast_place: Place, strides: tuple[int, int], inplace: bool) -> None:
    """Offsets of rows and classes want 64 bits; of the gigabytes between them nothing is touched, so that they cost
    nothing."""
    x, y = draw(fast_place, 3, 37, torch.float16, ignored=0)
    memory = torch.from_numpy(np.empty(36 * 2**27 + 2**10, np.float16))
    far = memory.as_strided(x.shape, strides).copy_(x)
    upstream = upstream_for(3, x.device)
    loss, grad = loss_and_grad(fast_place, far, y, upstream, reduction="none", label_smoothing=EPS, inplace=inplace)
    judge(fast_place, x, y, loss, grad, upstream)
    assert inplace or torch.equal(far, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scale_of_rows_apart(fast_place: Place, dtype: torch.dtype) -> None:
    """Rounded to nearest even, as PyTorch's product is, and nothing between the rows is written."""
    x, _ = draw(fast_place, 5, 37, dtype)
    grad, unharmed = guarded(x)
    scale = torch.full((1,), 1.5, device=x.device)
    backends.BACKENDS[fast_place[0]].kernels.scale_(grad, scale)
    unharmed()
    if truncates(fast_place[0], x):
        torch.testing.assert_close(grad, x * 1.5, rtol=2**-7, atol=0)
    else:
        assert torch.equal(grad, (x.float() * 1.5).to(dtype))


def test_ignored_rows_are_not_read(fast_place: Place) -> None:
    """Without statistics they save zeros, whatever they hold: the operators promise it."""
    x, y = draw(fast_place, 6, 37)
    x[0], x[3] = torch.nan, torch.inf
    kernels = backends.BACKENDS[fast_place[0]].kernels
    for form in ("forward", "forward_"):
        row = (y, None, None, 0.1, None, None, -100, False, False, 0.0, 0.0, 1.0, None)
        last = (True, 0) if form == "forward" else (0,)
        loss, saved, *_ = getattr(kernels, form)(x.clone(), *row, *last)
        for value in (loss, *saved):
            assert (value[y == -100] == 0).all()
            assert value.isfinite().all()


@pytest.mark.parametrize("k", [1, 37, 5000])
def test_predictions_of_nan_rows_are_classes(place: Place, k: int) -> None:
    x, y = torch.full((2, k), torch.nan, device=place[1]), torch.zeros(2, dtype=torch.int64, device=place[1])
    _, stats = lsk.cross_entropy(x, y, return_stats=True, backend=place[0])
    assert ((stats.prediction >= 0) & (stats.prediction < k)).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("view", ["one row expanded", "rows that overlap"])
def test_rows_that_overlap_are_not_overwritten(fast_place: Place, view: str, reduction: str) -> None:
    """inplace=True is a permission: of one row written while another is read, no loss comes out right."""
    x, y = draw(fast_place, ignored=0)
    call = {"reduction": reduction, "label_smoothing": EPS}
    want = loss_and_grad(fast_place, VIEWS[view](x), y, **call)
    before = x.clone()
    got = loss_and_grad(fast_place, VIEWS[view](x), y, inplace=True, **call)
    # Rows whose sums another kernel made: these differ in a last bit, and an entry that cancels q by 2**-28.
    torch.testing.assert_close(got, want, rtol=2**-22, atol=2**-28)
    assert torch.equal(x, before)


@pytest.mark.skipif(HAS_CUDA, reason="memory that PyTorch did not allocate, here from NumPy")
@pytest.mark.parametrize("offset", [4, 8, 12])
@pytest.mark.parametrize("inplace", [False, True])
def test_memory_that_is_not_16_byte_aligned(fast_place: Place, offset: int, inplace: bool) -> None:
    """With no element before it in the tensor's storage there is none to step back to."""
    x, y = draw(fast_place, 5, 37)
    buffer = np.full(5 * 37 + 16, np.nan, np.float32)
    skip = (offset - buffer.ctypes.data) % 16 // 4
    flat = torch.from_numpy(buffer[skip : skip + 5 * 37])
    assert (flat.data_ptr() % 16, flat.storage_offset()) == (offset, 0)
    logits = flat.view(5, 37).copy_(x)
    y, upstream = y[:5], upstream_for(5, "cpu")
    loss, grad = loss_and_grad(fast_place, logits, y, upstream, reduction="none", label_smoothing=EPS, inplace=inplace)
    judge(fast_place, x, y, loss, grad, upstream)
    assert np.isnan(np.delete(buffer, np.s_[skip : skip + 5 * 37])).all()
    if fast_place[0] == "triton":
        rows = importlib.import_module("labelsmooth_kernels.triton_kernels.rows")
        found = rows.rows_of(logits)
        assert (found.lead, found.vec, found.edges) == (0, 1, False), "narrow accesses"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_r01_the_loss_of_a_confident_row_keeps_its_digits(dtype: torch.dtype) -> None:
    """The CPU kernels promise more than the rule asks: log(1 + 2e-6) to five digits, although 1 + 2e-6 keeps one."""
    skip_unless_available("cpu")
    x = torch.full((1, 999), -20.0, dtype=dtype)
    x[0, 500] = 0.0
    loss = lsk.cross_entropy(x, torch.tensor([500]), backend="cpu")
    want = F.cross_entropy(x.double(), torch.tensor([500]))
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)


SHARED_OUT = [(16, 700, torch.float32), (70, 700, torch.float32), (16, 9001, torch.float32), (16, 9001, torch.float64)]


@pytest.mark.parametrize(("n", "k", "dtype"), SHARED_OUT, ids=str)
def test_equal_from_run_to_run(place: Place, n: int, k: int, dtype: torch.dtype) -> None:
    """Bit for bit, also with another number of threads (one, rows over threads, blocks of rows over threads): no
    atomics, no order that a scheduler chooses. And right: these are the shapes whose rows are shared out."""
    if place in EMULATED and n * k > 16 * 700:
        pytest.skip("an emulation has no threads to change, and takes a minute")
    if dtype not in backends.BACKENDS[place[0]].dtypes:
        pytest.skip(f"backend {place[0]} does not serve {dtype}")
    x, y = draw(place, n, k, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (threads, threads, 1, 3, 5):
            torch.set_num_threads(count)
            results.append(loss_and_grad(place, x, y, reduction="none", label_smoothing=EPS))
            results.append(loss_and_grad(place, x, y, 1.0, label_smoothing=EPS))
    finally:
        torch.set_num_threads(threads)
    for i, (loss, grad) in enumerate(results[2:]):
        assert torch.equal(loss, results[i % 2][0])
        assert torch.equal(grad, results[i % 2][1])
    judge(place, x, y, results[0][0], results[0][1], 1.0)
    judge(place, x, y, None, results[1][1], torch.tensor(1 / int((y != -100).sum()), dtype=torch.float64))
