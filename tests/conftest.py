"""Before any test imports torch: idle OpenMP threads must not spin on a machine of two shared cores."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
