"""Which of a node's environment variables reach other people's code: engines, hooks, installations, weights workers.

Engines get those that configure libraries and devices. A node's secrets reach a model only where its `env=` names them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from llmrun.errors import EngineError
from llmrun.settings import Settings
from llmrun.spec import SECRET_NAME, Secret
from llmrun_runtime.weights.stores.base import MODEL_VARIABLES

# Ray sets OMP_NUM_THREADS to the CPUs that an actor reserves; an engine counts its cores itself.
NEVER = frozenset({"OMP_NUM_THREADS"})
# Settings read them in any case, and one may be the admin key.
OWN = ("RAY_", "LLMRUN_")
PASSED = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TERM", "HOSTNAME", "VIRTUAL_ENV"),
        *("TMPDIR", "TMP", "TEMP", "CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    }
)
PASSED_PREFIXES = (
    *("LC_", "XDG_", "LD_", "PYTHON", "CONDA_", "MALLOC_", "TCMALLOC_", "GLIBC_", "DYLD_"),
    # devices, and communication between them
    *(
        "CUDA",
        "NVIDIA_",
        "NVCC_",
        "NVTE_",
        "NCCL_",
        "CUBLAS",
        "CUDNN_",
        "HIP_",
        "ROC",
        "HSA_",
        "AMD_",
        "MIOPEN_",
        "RCCL_",
    ),
    *("TPU_", "XLA_", "PJRT_", "LIBTPU_", "ONEAPI_", "SYCL_", "ZE_", "CCL_", "HABANA_", "GLOO_", "UCX_", "FI_"),
    # numerics
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "NUMBA_", "BLIS_"),
    # engines and their libraries
    *("VLLM_", "SGL", "TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_", "TVM_", "TRANSFORMERS_", "TOKENIZERS_", "HF_"),
)
INSTALLER_PREFIXES = ("UV_", "CMAKE_", "CARGO_", "RUST", "PKG_CONFIG", "MAKE", "GIT_", "SSH_AUTH_SOCK")
# Weights workers run the stores' packages, which need no secret of llmrun.
WORKER_SETTINGS = ("LLMRUN_HOME", "LLMRUN_WEIGHTS_DIR", "LLMRUN_WEIGHTS_MAX_BYTES")


def engine_env(spec_env: Mapping[str, Secret | str], where: str) -> dict[str, str]:
    """Return an engine's variables: some of the node's, updated with a spec's. Raises EngineError, see `_resolved`."""
    more = [name.strip() for name in Settings().engine_env.split(",") if name.strip()]
    return {k: v for k, v in os.environ.items() if _passes(k, more)} | _resolved(spec_env, where)


def installer_env() -> dict[str, str]:
    """Return the variables of an installation, which runs the build scripts of packages."""
    return engine_env({}, "") | {k: v for k, v in os.environ.items() if k.startswith(INSTALLER_PREFIXES)}


def worker_env(spec_env: Mapping[str, Secret | str], where: str) -> dict[str, str]:
    """Return a weights worker's variables: all of the node's, for the stores' credentials, then a spec's.

    Raises EngineError, see `_resolved`.
    """
    env = {k: v for k, v in os.environ.items() if not k.upper().startswith(OWN) and k not in NEVER}
    settings = {key: value for key, value in os.environ.items() if key.upper() in WORKER_SETTINGS}
    return env | _resolved(spec_env, where) | settings | {MODEL_VARIABLES: ",".join(sorted(spec_env))}


def _passes(name: str, more: list[str]) -> bool:
    upper = name.upper()
    if upper.startswith(OWN) or name in NEVER:
        return False
    if any(name == each or (each.endswith("*") and name.startswith(each[:-1])) for each in more):
        return True
    return (upper in PASSED or upper.startswith(PASSED_PREFIXES)) and not SECRET_NAME.search(upper)


def _resolved(spec_env: Mapping[str, Secret | str], where: str) -> dict[str, str]:
    """Return a spec's variables. Raises EngineError for a secret that the node does not have."""
    env: dict[str, str] = {}
    for key, value in spec_env.items():
        if isinstance(value, Secret):
            if value.secret not in os.environ:
                raise EngineError(
                    f"env={key!r}: the secret {value.secret} is not set on {where}: "
                    f"set it there in the environment of `llmrun up` or `ray start`"
                )
            env[key] = os.environ[value.secret]
        else:
            env[key] = value
    return env
