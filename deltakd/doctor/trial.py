"""What the doctor has a process of its own try on a GPU, since it needs torch: prints one line of JSON.

python -m deltakd.doctor.trial
"""

import json
from importlib.util import find_spec
from typing import Any

import torch

PINNED_BYTES = 2**26


def main() -> None:
    """Try the GPU, pinned memory and flash-attn; whatever fails is a fault in the answer."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        torch.cuda.init()
        found["devices"] = torch.cuda.device_count()
        major, minor = torch.cuda.get_device_capability()
        found["capability"] = f"sm_{major}{minor}"
        assert (torch.ones(4, device="cuda") * 2).sum().item() == 8
        version: Any = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
        found["nccl"] = ".".join(str(part) for part in version)
    except Exception as fault:  # the driver's, CUDA's and torch's are of no one kind
        found["fault"] = _brief(fault)
    else:
        try:
            torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
        except Exception as fault:
            found["pin_fault"] = _brief(fault)
    if find_spec("flash_attn") is not None:
        try:
            import flash_attn

            found["flash"] = flash_attn.__version__
        except Exception as fault:  # built against another torch: ImportError with an undefined symbol, or worse
            found["flash_fault"] = _brief(fault)
    print(json.dumps(found))


def _brief(fault: Exception) -> str:
    return (str(fault).splitlines() or [type(fault).__name__])[0][:150]


if __name__ == "__main__":
    main()
