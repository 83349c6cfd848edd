"""``python -m labelsmooth_kernels``: the doctor."""

import sys

from .doctor import main

sys.exit(main())
