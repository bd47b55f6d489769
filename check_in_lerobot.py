"""Does LeRobot answer as the training did? Every SmolVLA export holds one observation, the noise and the actions that
they gave (example.safetensors), and this file. On the robot's machine, where LeRobot 0.4 or newer is installed:

    python final_hf/check_in_lerobot.py final_hf
"""

import sys
from pathlib import Path

import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors import safe_open

folder = Path(sys.argv[1])
with safe_open(folder / "example.safetensors", "pt") as file:
    example, task = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()["task"]  # noqa: SIM118
example = {k: v.permute(2, 0, 1) / 255 if v.dtype == torch.uint8 else v for k, v in example.items()}
policy = SmolVLAPolicy.from_pretrained(folder).eval()
device = str(next(policy.parameters()).device)
overrides = dict(preprocessor_overrides={"device_processor": {"device": device}})
before, after = make_pre_post_processors(policy.config, pretrained_path=str(folder), **overrides)
ours, noise = example.pop("actions"), example.pop("noise").to(device)
theirs = after(policy.predict_action_chunk(before(example | {"task": task}), noise=noise)).float().cpu()
error = (theirs - ours).abs().flatten(0, -2).amax(0)
with safe_open(next(folder.glob("*unnormalizer_processor.safetensors")), "pt") as file:
    std = file.get_tensor("action.std")
share = torch.where(std > 0, error / std, 0)  # a dimension that never moves has no scale
print("largest difference per dimension ", " ".join(f"{e:.2g}" for e in error.tolist()))
print("in standard deviations of the data", " ".join(f"{s:.2g}" for s in share.tolist()))
if not share.max() < 0.1:
    sys.exit("LeRobot answers differently: do not drive with this export. Is it another release, or another backbone?")
print("LeRobot answers as the training did")
