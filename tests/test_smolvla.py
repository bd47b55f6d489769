"""SmolVLA: parity with what LeRobot computed (../shared/fixtures), the training's promises, and the exported format."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train_smolvla_sim as smolvla


# ---- parity with LeRobot ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lerobot(shared):
    """What LeRobot 0.4.4 saved and computed: (folder of the policy, {name: array})."""
    return shared / "fixtures/smolvla_lerobot/policy", dict(np.load(shared / "fixtures/smolvla_lerobot/io.npz"))


@pytest.fixture(scope="module")
def lerobot_policy(lerobot):
    return smolvla.load_policy(lerobot[0], "cpu")


def lerobot_batch(io, policy):
    """The fixture's raw inputs through our own preprocessing."""
    observations = [dict(images=[io[f"raw.observation.images.camera{k}"][b].transpose(1, 2, 0) for k in (1, 2, 3)], state=io["raw.observation.state"][b], instruction=str(io["task"][b])) for b in range(3)]
    items = [o | dict(action=io["raw.action"][b], is_pad=np.zeros(10, bool), noise=io["noise"][b], time=float(io["time"][b]), episode_index=0, episode="", frame=b) for b, o in enumerate(observations)]
    return observations, policy.collate(items)


def test_keys_and_shapes_are_lerobots(lerobot, lerobot_policy, shared):
    from safetensors.torch import load_file

    listed = {line.split("\t")[0]: line.split("\t")[1] for line in (shared / "fixtures/smolvla_lerobot/params.txt").read_text().splitlines()}
    file = load_file(lerobot[0] / "model.safetensors")
    ours = lerobot_policy.model.state_dict()
    assert set(ours) == set(file) == set(listed)
    assert {k: str(tuple(v.shape)) for k, v in ours.items()} == listed
    assert all(torch.equal(ours[k], v) for k, v in file.items())


def test_real_size_has_500_tensors_and_450_million_parameters():
    from transformers import SmolVLMConfig

    config = SmolVLMConfig(text_config=dict(model_type="llama", hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5, head_dim=64, vocab_size=49280),
                           vision_config=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16), scale_factor=4)
    cfg = smolvla.Config()
    with torch.device("meta"):
        model = smolvla.SmolVLA(smolvla.make_sizes(config, cfg.policy), 512, 6)
    smolvla.choose_trained(model, cfg)
    assert len(model.state_dict()) == 500
    assert sum(p.numel() for p in model.parameters()) == 450_046_176
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 99_880_992


def test_a_missing_or_foreign_tensor_is_refused(lerobot, lerobot_policy):
    tensors = smolvla.read_policy_weights(lerobot[0])
    name = next(iter(tensors))
    for changed in ({k: v for k, v in tensors.items() if k != name}, tensors | {"model.extra": torch.zeros(1)}, tensors | {name: torch.zeros(3)}):
        with pytest.raises(ValueError, match="Nothing was loaded"):
            smolvla.load_exact(lerobot_policy.model, changed, "test")


def test_preprocessing_equals_lerobots(lerobot, lerobot_policy):
    io = lerobot[1]
    _, batch = lerobot_batch(io, lerobot_policy)
    assert np.array_equal(batch["tokens"], io["tokens"]) and np.array_equal(batch["token_mask"], io["lang_mask"])
    np.testing.assert_allclose(batch["state"], io["state"], atol=1e-5)
    np.testing.assert_allclose(batch["action"], io["actions"], atol=1e-5)
    for k in range(3):
        ours = smolvla.resize_with_pad(torch.from_numpy(io[f"raw.observation.images.camera{k + 1}"]), 64)
        np.testing.assert_allclose(ours, io["images"][:, k], atol=1e-5)


def test_loss_and_gradients_equal_lerobots(lerobot, lerobot_policy):
    io, model = lerobot[1], lerobot_policy.model
    cfg = smolvla.Config()
    smolvla.choose_trained(model, cfg)
    _, batch = lerobot_batch(io, lerobot_policy)
    out = model(batch)
    loss = out["flow_sum"] / io["losses"].size
    loss.backward()
    assert loss.item() == pytest.approx(float(io["loss"]), abs=1e-4)
    np.testing.assert_allclose(out["sample_loss"], io["losses"].mean((1, 2)), atol=1e-4)
    assert out["real_sum"].item() == pytest.approx(io["losses"][..., :6].sum(), abs=1e-2)
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.requires_grad_(False)
    # LeRobot also lists frozen or unused tensors with gradient 0
    theirs = dict(zip(io["grad_names"].tolist(), io["grad_norms"].tolist()))
    assert set(norms) == set(theirs)
    for name, value in theirs.items():
        assert norms[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_sampled_actions_equal_lerobots(lerobot, lerobot_policy):
    io = lerobot[1]
    observations, batch = lerobot_batch(io, lerobot_policy)
    chunk = lerobot_policy.model.sample(batch, torch.from_numpy(io["noise"]))
    np.testing.assert_allclose(chunk, io["chunk"], atol=1e-4)
    images = lambda o: {f"camera{k + 1}": image for k, image in enumerate(o["images"])}
    predicted = lerobot_policy.predict([o | dict(images=images(o)) for o in observations], io["noise"])
    np.testing.assert_allclose(predicted, io["chunk_unnormalised"], atol=1e-4)
