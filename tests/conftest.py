"""Before anything imports JAX: settings under which XLA's CPU backend does not wait for itself.

jaxlib 0.10.2 on two cores hangs now and then in MJX's batched LAPACK calls, when the calls fill the pool that they wait
for. One Eigen thread per call and a pool larger than the machine keep it moving.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
os.environ.setdefault("NPROC", "16")
