"""An installed wheel, used outside the source tree: it holds what it should and its backends agree."""

import sys
from pathlib import Path

import torch
from labelsmooth_kernels.triton_kernels import logits as triton_logits

import labelsmooth_kernels as lsk
from labelsmooth_kernels.doctor import report

root = Path(sys.argv[1])
for module in (lsk.__file__, triton_logits.__file__):
    assert root in Path(module or "/").parents, f"{module} is not the wheel in {root}"
package = root / "labelsmooth_kernels"
for pattern in ("py.typed", "_C*.so", "_build_info.json"):
    assert list(package.glob(pattern)), f"the wheel has no {pattern}: {sorted(package.iterdir())}"

logits = torch.randn(8, 32000, requires_grad=True)
target = torch.randint(0, 32000, (8,))
loss = lsk.cross_entropy(logits, target, label_smoothing=0.1, backend="cpu")
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1))
loss.backward()
assert report(strict=True)
