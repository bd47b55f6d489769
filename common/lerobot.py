"""Write and read a policy directory as LeRobot 0.3.4 to 0.6.2 saves it, all but its weights, which the script handles.

config.json | policy_preprocessor.json, policy_postprocessor.json: steps | a .safetensors of the statistics for each."""

import json
from pathlib import Path

import numpy as np
import torch

from common import checkpoint as ckpt
from common import hub, require
from common.stats import LISTS, MODES

NORMALIZER = "policy_preprocessor_step_5_normalizer_processor.safetensors"
UNNORMALIZER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
# where ours differ from the defaults of LeRobot's config; it takes its default for a missing field, but refuses unknown
# ones. load_vlm_weights as in smolvla_base, for a VLM in bf16: in fp32 LeRobot 0.4.4 misplaces the image patches
SETTINGS = dict(type="smolvla", push_to_hub=False, pad_language_to="max_length", load_vlm_weights=True)


def write(folder, network, cameras, state, action, stats, mode, device):
    """All files but the weights. `network`: LeRobot's settings of SmolVLA | cameras {camera1: (h, w)} | state, action:
    common.stats.Normalizer | stats: of common.stats | mode: LeRobot's name of the normalisation."""
    from safetensors.torch import save_file

    def write_json(name, value):
        (folder / name).write_text(json.dumps(value, indent=2))

    def step(name, state_file=None, **settings):
        return dict(registry_name=name, config=settings) | (dict(state_file=state_file) if state_file else {})

    folder, images = Path(folder), {f"observation.images.{name}": [3, *shape] for name, shape in cameras.items()}
    inputs = {name: dict(type="VISUAL", shape=shape) for name, shape in images.items()}
    inputs["observation.state"] = dict(type="STATE", shape=[state.dim])
    output = dict(action=dict(type="ACTION", shape=[action.dim]))
    modes = dict(VISUAL="IDENTITY", STATE=mode, ACTION=mode)
    features = dict(input_features=inputs, output_features=output, normalization_mapping=modes)
    write_json("config.json", SETTINGS | features | network | dict(device=device))
    length, tokenizer = network["tokenizer_max_length"], network["vlm_model_name"]
    text = dict(task_key="task", padding_side="right", padding="max_length", truncation=True)
    scaling = dict(eps=1e-8, norm_map=modes)
    before = [
        step("rename_observations_processor", rename_map={}),
        step("to_batch_processor"),
        step("smolvla_new_line_processor"),
        step("tokenizer_processor", max_length=length, tokenizer_name=tokenizer, **text),
        step("device_processor", device=device, float_dtype=None),
        step("normalizer_processor", NORMALIZER, features=inputs | output, **scaling),
    ]
    after = [step("unnormalizer_processor", UNNORMALIZER, features=output, **scaling)]
    after.append(step("device_processor", device="cpu", float_dtype=None))
    write_json("policy_preprocessor.json", dict(name="policy_preprocessor", steps=before))
    write_json("policy_postprocessor.json", dict(name="policy_postprocessor", steps=after))
    for name in (NORMALIZER, UNNORMALIZER):
        save_file(_statistics(state, action, stats), folder / name)


def _statistics(state, action, stats):
    """{"action.mean": tensor, ...} with which LeRobot normalises exactly as common/stats.py does, also in a constant
    dimension: an action comes back as that constant whatever was sampled, a state's noise is not divided by 1e-8."""
    out = {}
    for key, n, spread in (("action", action, 0.0), ("observation.state", state, 1.0)):
        half, values = np.where(n.constant, spread, n.half), dict(stats[key])
        if n.mode == "mean_std":
            values |= dict(mean=n.center, std=half)
        elif n.mode != "identity":
            low, high = MODES[n.mode]
            values |= {low: n.center - half, high: n.center + half}
        out |= {f"{key}.{k}": torch.tensor(np.asarray(values[k]), dtype=torch.float32) for k in LISTS if k in values}
    return out


def read_config(folder):
    """-> config.json of a SmolVLA"""
    config = ckpt.read_json(Path(folder) / "config.json")
    found = (config.get("type"), config.get("add_image_special_tokens", False))
    wrong = f"{folder}/config.json has type, add_image_special_tokens = {found}; expected ('smolvla', False)"
    require(found == ("smolvla", False), wrong)
    return config


def read_statistics(folder, config):
    """-> ({"action": {mean: [...], ...}, "observation.state": ...}, mode)"""
    file, mapping, stats = Path(folder) / NORMALIZER, config["normalization_mapping"], {}
    one_way = file.is_file() and mapping["STATE"] == mapping["ACTION"]
    for key, value in hub.read_tensors(file) if one_way else ():
        stats.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = value.tolist()
    unknown = "so the units of its actions are unknown. Fine-tune from it instead: --init_from"
    problem = f"{folder} has statistics of {sorted(stats) or 'nothing'}, not of action and observation.state"
    require({"action", "observation.state"} <= set(stats), f"{problem}, {unknown} {folder}")
    return stats, mapping["STATE"]
