"""Peak memory of the host while a backbone is loaded, beside the size of its largest file.

    python benchmarks/loading_memory.py > benchmarks/results/loading_memory.txt

Writes a random Qwen2.5-VL of 500 MB in files of 100 MB and loads it in fresh processes: as the scripts do, one tensor
after the other straight to the device, and with transformers' from_pretrained. "Beside the model" is the peak of the
resident memory, minus what was resident before and, where the device is the CPU, minus the model itself: what loading
needs and gives back. Pages of the mapped files count, although the system may take them back at any time. Promised: not
more than the largest file and 1 GB.
"""

import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import Qwen2_5_VLForConditionalGeneration as Model

import make_demo
from common.qwen_vl import load_backbone

MB = 1e6


def memory(key):
    """Bytes of /proc/self/status: VmRSS, what is resident now; VmHWM, the most since `forget`."""
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def forget():
    Path("/proc/self/clear_refs").write_text("5")


def load(folder, how, kind):
    """-> the line of one way of loading, measured in this process."""
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, kind)
    torch.zeros(1, device=device)
    Model.from_pretrained(make_demo.write_qwen2_5_vl(Path(folder, "tiny"), text=(32, 1), vision=(16, 1)))  # all imports
    forget()
    before = memory("VmRSS")
    if how == "from_pretrained":
        model = Model.from_pretrained(Path(folder, "model"), dtype=dtype).to(device)
    else:
        model = load_backbone(Path(folder, "model"), dtype, "sdpa", device=device)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(path.stat().st_size for path in Path(folder, "model").glob("*.safetensors"))
    beside = memory("VmHWM") - before - (size if device.type == "cpu" else 0)
    return f"{how:<16} {kind:<9} {size / MB:8.0f} {largest / MB:13.0f} {beside / MB:19.0f}"


def main():
    if len(sys.argv) > 1:
        print(load(*sys.argv[1:]))
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    columns = "loaded by        as        the model  largest file    beside the model"
    print(f"torch {torch.__version__}, {name}; MB\n{columns}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        made = make_demo.write_qwen2_5_vl(Path(folder, "made"), text=(1024, 24), vision=(512, 8))
        Model.from_pretrained(made).save_pretrained(Path(folder, "model"), max_shard_size="100MB")
        for how in (["load_backbone", "float32"], ["load_backbone", "bfloat16"], ["from_pretrained", "bfloat16"]):
            subprocess.run([sys.executable, __file__, folder, *how], check=True)


if __name__ == "__main__":
    main()
