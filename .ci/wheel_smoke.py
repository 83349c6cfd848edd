"""An installed wheel, used outside the source tree: it holds what it should and its backends agree."""

import sys
from pathlib import Path

import torch

import labelsmooth_kernels as lsk
from labelsmooth_kernels.doctor import report
from labelsmooth_kernels.triton_kernels import logits as triton_logits

root = Path(sys.argv[1])
for module in (lsk.__file__, triton_logits.__file__):
    assert module is not None and root in Path(module).parents, f"{module} is not the wheel in {root}"
package = root / "labelsmooth_kernels"
assert (package / "py.typed").exists() and list(package.glob("_C*.so")), sorted(package.iterdir())

logits = torch.randn(8, 32000, requires_grad=True)
target = torch.randint(0, 32000, (8,))
loss = lsk.cross_entropy(logits, target, label_smoothing=0.1, backend="cpu")
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1))
loss.backward()
assert report()
