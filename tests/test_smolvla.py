"""SmolVLA: parity with what LeRobot computed (../shared/fixtures), the training's promises, and the exported format.
What all scripts keep (accumulation, ranks, stop and resume, non-finite steps) is in test_truths.py."""

import csv
import dataclasses
import json
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import compute_stats
import make_demo
import train_smolvla_sim as smolvla
from common import UserError, frozen
from common.config import parse_config
from common.log import read_metrics
from common.run import Run
from common.stats import save_stats
from recipes import same

VLM = "model.vlm_with_expert.vlm."
pytestmark = pytest.mark.usefixtures("no_plot")


# ---- parity with LeRobot ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lerobot(shared):
    """What LeRobot 0.4.4 saved and computed: (folder of the policy, {name: array})."""
    return shared / "fixtures/smolvla_lerobot/policy", dict(np.load(shared / "fixtures/smolvla_lerobot/io.npz"))


@pytest.fixture(scope="module")
def lerobot_policy(lerobot):
    return smolvla.load_policy(lerobot[0], "cpu")


@pytest.fixture(scope="module")
def lerobot_batch(lerobot, lerobot_policy):
    """The fixture's raw inputs through our own preprocessing: (observations, batch)."""
    io, observations, items = lerobot[1], [], []
    for b in range(3):
        images = [io[f"raw.observation.images.camera{k}"][b].transpose(1, 2, 0) for k in (1, 2, 3)]
        observations.append(dict(images=images, state=io["raw.observation.state"][b], instruction=str(io["task"][b])))
        more = dict(action=io["raw.action"][b], is_pad=np.zeros(10, bool), noise=io["noise"][b], time=io["time"][b])
        items.append(observations[-1] | more | dict(name=(0, "", b)))
    return observations, lerobot_policy.collate(items)


def test_keys_and_shapes_are_lerobots(lerobot, lerobot_policy, shared):
    lines = (shared / "fixtures/smolvla_lerobot/params.txt").read_text().splitlines()
    listed = {line.split("\t")[0]: line.split("\t")[1] for line in lines}
    file, ours = load_file(lerobot[0] / "model.safetensors"), lerobot_policy.model.state_dict()
    assert set(ours) == set(file) and {k: str(tuple(v.shape)) for k, v in ours.items()} == listed
    assert all(torch.equal(ours[k], v) for k, v in file.items())


def test_real_size_has_500_tensors_and_450_million_parameters():
    from transformers import SmolVLMConfig

    text = dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, vocab_size=49280)
    text |= dict(model_type="llama", num_key_value_heads=5, head_dim=64)
    vision = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    config = SmolVLMConfig(text_config=text, vision_config=vision | dict(image_size=512, patch_size=16), scale_factor=4)
    with torch.device("meta"):
        model = smolvla.SmolVLA(config, smolvla.Config().policy, 6)
    smolvla.choose_trained(model, smolvla.Config())
    assert len(model.state_dict()) == 500
    assert sum(p.numel() for p in model.parameters()) == 450_046_176
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 99_880_992
    assert not list(model.buffers())  # a model made on the meta device is whole once its weights are read


def test_preprocessing_equals_lerobots(lerobot, lerobot_batch):
    io, batch = lerobot[1], lerobot_batch[1]
    assert np.array_equal(batch["tokens"], io["tokens"]) and np.array_equal(batch["token_mask"], io["lang_mask"])
    np.testing.assert_allclose(batch["state"], io["state"], atol=1e-5)
    np.testing.assert_allclose(batch["action"], io["actions"], atol=1e-5)
    for k in range(3):
        ours = smolvla.resize_with_pad(torch.from_numpy(io[f"raw.observation.images.camera{k + 1}"]), 64)
        np.testing.assert_allclose(ours, io["images"][:, k], atol=1e-5)


def test_loss_and_gradients_equal_lerobots(lerobot, lerobot_policy, lerobot_batch):
    io, model = lerobot[1], lerobot_policy.model
    smolvla.choose_trained(model, smolvla.Config())
    out = model(lerobot_batch[1])
    loss = out["flow_sum"] / io["losses"].size
    loss.backward()
    assert loss.item() == pytest.approx(float(io["loss"]), abs=1e-5)
    np.testing.assert_allclose(out["sample_loss"], io["losses"].mean((1, 2)), atol=1e-5)
    assert out["real_sum"].item() == pytest.approx(io["losses"][..., :6].sum(), abs=1e-3)
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.requires_grad_(False)
    # LeRobot also lists frozen or unused tensors with gradient 0
    theirs = dict(zip(io["grad_names"].tolist(), io["grad_norms"].tolist(), strict=True))
    assert set(norms) == set(theirs)
    for name, value in theirs.items():
        assert norms[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_sampled_actions_equal_lerobots(lerobot, lerobot_policy, lerobot_batch):
    io, (observations, batch) = lerobot[1], lerobot_batch
    chunk = lerobot_policy.model.sample(batch, torch.from_numpy(io["noise"]))
    np.testing.assert_allclose(chunk, io["chunk"], atol=1e-5)
    inputs = lerobot_policy.collate.inputs(observations)
    np.testing.assert_allclose(lerobot_policy.decode(inputs, io["noise"]), io["chunk_unnormalised"], atol=1e-5)


# ---- a tiny run ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def sim_root(tmp_path_factory):
    """5 episodes of 12 frames in the simulator's form: joint targets, metres, no instruction."""
    folder = tmp_path_factory.mktemp("sim")
    make_demo.write_insertion_sim(folder, episodes=5, size=(60, 80), max_frames=12)
    return folder


@pytest.fixture(scope="session")
def vlm_dir(tmp_path_factory):
    """A tiny backbone whose config says bfloat16, as the published one's does."""
    sizes = dict(text=(48, 3), vision=(32, 2), image_size=64, patch=8, shuffle=2)
    folder = make_demo.write_smolvlm2(tmp_path_factory.mktemp("smolvlm2"), **sizes)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TINY = dict(dataset__horizon=4, policy__chunk_size=4, policy__n_action_steps=4, policy__num_vlm_layers=2)
TINY |= dict(policy__resize_imgs_with_padding="32 32", policy__max_state_dim=8, policy__max_action_dim=8)
TINY |= dict(policy__tokenizer_max_length=20, policy__num_steps=3, training__batch_size=2, training__num_workers=0)
TINY |= dict(training__steps=4, training__log_freq=1, training__save_freq=100, validation__num_episodes=1)
TINY |= dict(validation__val_freq=100, validation__num_samples=4, optimizer__lr=1e-3)
TINY |= dict(scheduler__num_warmup_steps=2, scheduler__num_decay_steps=4)


def config(**flags):
    """Config of a tiny run; a flag's dot is written as two underscores."""
    argv = []
    for key, value in (TINY | flags).items():
        argv += [f"--{key.replace('__', '.')}", *str(value).split()]
    return parse_config(smolvla.Config, argv, smolvla.ALIASES)


@pytest.fixture
def make(tmp_path, sim_root, vlm_dir):
    """make(out, **flags) -> Config of a tiny run into tmp_path/out."""
    base = dict(dataset__root_dir=sim_root, policy__vlm_model_name=vlm_dir)
    return lambda out="run", **flags: config(**(base | dict(output_dir=tmp_path / out) | flags))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, sim_root, vlm_dir):
    """(output_dir, state, metrics) of a finished run of 4 steps, all saved and validated each second."""
    out = tmp_path_factory.mktemp("plain")
    flags = dict(dataset__root_dir=sim_root, policy__vlm_model_name=vlm_dir, output_dir=out)
    return out, *train(config(**flags, training__save_freq=2, validation__val_freq=2))


def read_checkpoint(path):
    """What a checkpoint holds, and the whole policy that it stands for, by LeRobot's names."""
    state = torch.load(path, weights_only=True)
    return state | dict(policy_state_dict=smolvla.policy_weights(path, state))


def train(cfg):
    """Run main -> (state of the last checkpoint, metrics rows)."""
    smolvla.main(cfg)
    return read_checkpoint(Path(cfg.output_dir) / "checkpoints/checkpoint_latest.pt"), read_metrics(cfg.output_dir)


def batch_of(cfg, count=4, start=0, dtype=torch.float32):
    """(core model, collate, batch) with `count` samples of a config's training data."""
    data = smolvla.load_data(cfg)
    vlm_config, tokenizer = smolvla.open_vlm(cfg.policy.vlm_model_name)
    core, _, _ = smolvla.build_model(cfg, vlm_config, data.spec.definition.dim, dtype)
    dataset, collate = smolvla.SmolVLADataset(data, data.train, cfg), smolvla.Collate(tokenizer, cfg.policy, data.spec)
    return core, collate, collate([dataset[(i, i)] for i in range(start, start + count)])


# ---- files, resume, init_from ----------------------------------------------------------------------------------------
def test_checkpoint_files_their_step_and_an_export_that_is_missing(make, plain, tmp_path, monkeypatch):
    folder = shutil.copytree(plain[0], tmp_path / "run") / "checkpoints"
    own = {"checkpoint_latest.pt", "checkpoint_step_2.pt", "checkpoint_step_4.pt", "best_hf", "final_hf", "meta.json"}
    assert {p.name for p in folder.iterdir()} == own | {"frozen.safetensors"}
    two, four = (read_checkpoint(folder / f"checkpoint_step_{n}.pt")["policy_state_dict"] for n in (2, 4))
    same(plain[1]["policy_state_dict"], four)
    best = {2: two, 4: four}[json.loads((folder / "best_hf/meta.json").read_text())["step"]]
    same(load_file(folder / "best_hf/model.safetensors"), best)
    same(load_file(folder / "final_hf/model.safetensors"), four)
    monkeypatch.setattr(smolvla, "build_model", lambda *_: pytest.fail("nothing is to be trained"))
    meta = folder / "final_hf/meta.json"
    # an export that is gone, and one from before --steps was raised
    for spoil in (shutil.rmtree, lambda _: meta.write_text(meta.read_text().replace('"step": 4', '"step": 2'))):
        spoil(folder / "final_hf")
        smolvla.main(make(resume="auto", training__save_freq=2, validation__val_freq=2))
        assert json.loads(meta.read_text())["step"] == 4
        same(load_file(folder / "final_hf/model.safetensors"), four)


def test_resume_of_another_data_set_is_a_new_run_from_the_weights(make, plain, tmp_path, capsys):
    """Guide 2, stage 3: --resume X --steps N --lr L with another config."""
    old, latest = plain[1], plain[0] / "checkpoints/checkpoint_latest.pt"
    make_demo.write_insertion_sim(tmp_path / "real", episodes=4, seed=7, size=(60, 80), max_frames=10)
    new, rows = train(make("real_run", dataset__root_dir=tmp_path / "real", resume=latest, steps=3, lr=1e-5))
    assert "a NEW RUN from its weights" in capsys.readouterr().out
    assert new["step"] == 3 and [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3]
    assert max(r["train/learning_rate"] for r in rows if "train/loss" in r) == pytest.approx(1e-5)
    assert new["normalization_stats"]["num_episodes"] == 3
    before, after = (state["policy_state_dict"]["model.action_out_proj.weight"] for state in (old, new))
    assert 0 < (after - before).abs().max().item() < 4e-5  # three Adam steps of at most 1e-5 from the old weights


def test_reset_scheduler_keeps_weights_and_moments_and_warms_up_again(make, plain, monkeypatch):
    monkeypatch.setattr(Run, "stopping", lambda run: run.step == 6)
    for resume in (plain[0] / "checkpoints/checkpoint_latest.pt", "auto"):  # as the stopped run says
        began = "gone" if resume == "auto" else None
        state, rows = train(make("again", steps=8, resume=resume, reset_scheduler=True, init_from=began))
    lrs = [[r["train/learning_rate"] for r in part if "train/loss" in r] for part in (plain[2], rows)]
    assert lrs[0] == pytest.approx(lrs[1]) and lrs[0][:2] == pytest.approx([5e-4, 1e-3])
    assert state["optimizer_state_dict"]["model.action_out_proj.weight"]["step"] == 8 and state["schedule_begin"] == 4
    assert train(make("again", steps=10, resume="auto", reset_scheduler=True))[0]["schedule_begin"] == 8


def test_init_from_starts_from_exactly_these_weights(make, tmp_path):
    """Of a checkpoint, of an export, and of older and the guide's own programs: names of torch.compile and DDP,
    normalisers inside the model, numpy arrays beside the weights."""
    first = train(make("run", training__ema_decay=0.5, train="lora"))[0]["policy_state_dict"]
    for source in ("checkpoint_latest.pt", "final_hf"):
        state, _ = train(make(source, init_from=tmp_path / "run/checkpoints" / source, lr=0.0, steps=1))
        same(state["policy_state_dict"], first)
    assert train(make(source, init_from="gone", steps=2, resume="auto"))[0]["step"] == 2  # a stopped run's own weights
    old = {k.replace("model.", "model._orig_mod.", 1): v for k, v in first.items()}
    old["normalize_inputs.buffer_observation_state.mean"] = torch.zeros(6)
    guides = dict(step=7, action_mean=np.ones(6, np.float32), action_std=np.float64(2.0), config=dict(policy={}))
    guides["policy_state_dict"] = {f"module.{k}": v for k, v in first.items()}
    for content in (old, guides):
        torch.save(content, tmp_path / "other.pt")
        same(smolvla.read_source(tmp_path / "other.pt")[0], dict(first))


def test_a_lerobot_policy_can_be_fine_tuned(make, lerobot, tmp_path):
    sizes = dict(policy__vlm_model_name=lerobot[0].parent / "vlm", policy__num_vlm_layers=4)
    sizes |= dict(policy__resize_imgs_with_padding="64 64", policy__tokenizer_max_length=12)
    state, _ = train(make(policy__pretrained_model_id=lerobot[0], lr=0.0, steps=1, **sizes))
    same(state["policy_state_dict"], load_file(lerobot[0] / "model.safetensors"))
    # another max_period fits in shape, not in its results
    for key, value, message in (("max_period", 2.0, "4.0, this run 2.0"), ("max_action_dim", 16, "another model")):
        with pytest.raises(UserError, match=message):
            smolvla.main(make("wrong", policy__pretrained_model_id=lerobot[0], **sizes | {f"policy__{key}": value}))


def test_a_checkpoint_stands_on_one_file_of_what_is_frozen(make, tmp_path, vlm_dir):
    """It holds what is trained; the rest is as it was read. Without that file, or with another one, it says so; an
    export is whole."""
    state, _ = train(make(steps=2))
    folder = tmp_path / "run/checkpoints"
    kept = load_file(folder / "frozen.safetensors")
    read = load_file(vlm_dir / "model.safetensors").items()  # without layer 2 of the text, which is not used
    same({k.removeprefix(VLM): v for k, v in kept.items()}, {k: v for k, v in read if ".layers.2." not in k})
    assert not any(k.startswith(VLM) for k in (*state["optimizer_state_dict"], *state["model_state_dict"]))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    expected = smolvla.load_policy(folder / "checkpoint_step_2.pt", "cpu").model.state_dict()
    (folder / "frozen.safetensors").rename(tmp_path / "away")
    for act in (lambda: smolvla.load_policy(folder), lambda: smolvla.main(make(steps=4, resume="auto"))):
        with pytest.raises(UserError, match=f"the other weights are in {folder}/frozen.safetensors, which is gone"):
            act()
    for whole in (moved / "checkpoint_step_2.pt", folder / "final_hf"):
        same(smolvla.load_policy(whole, "cpu").model.state_dict(), expected)
    save_file({k: v + 1 for k, v in kept.items()}, folder / "frozen.safetensors")
    with pytest.raises(UserError, match="frozen.safetensors is another file. Put it beside the checkpoint"):
        smolvla.load_policy(folder / "checkpoint_step_2.pt")
    shutil.copy(tmp_path / "away", folder / "frozen.safetensors")
    before = (folder / "frozen.safetensors").stat().st_mtime_ns
    again, _ = train(make(steps=4, resume="auto"))
    assert (folder / "frozen.safetensors").stat().st_mtime_ns == before and again["frozen"] == state["frozen"]


def test_a_new_run_keeps_what_checkpoints_that_were_moved_away_stand_on(tmp_path):
    run = SimpleNamespace(once=lambda act, *args: act(*args), save_as=lambda path, write, _: (write(path), True)[1])
    one, two = (torch.nn.Linear(2, 2).requires_grad_(False) for _ in range(2))
    kept = [(model, frozen.keep(run, tmp_path, model)) for model in (one, one, two)]
    assert kept[0][1] == kept[1][1] and len(list(tmp_path.iterdir())) == 2
    for model, about in kept:
        assert torch.equal(frozen.read(tmp_path / "away/x.pt", dict(frozen=about))["weight"], model.weight)


# ---- loss ------------------------------------------------------------------------------------------------------------
def test_padding_changes_no_loss(make):
    core, _, batch = batch_of(make(), count=2, start=9)  # frames 9 and 10 of 12: chunks of 4 run past the end
    assert batch["is_pad"].any() and not batch["is_pad"].all(1).any()
    before, pad = core(batch), torch.nn.functional.pad
    longer = batch | dict(tokens=pad(batch["tokens"], (0, 5), value=3), token_mask=pad(batch["token_mask"], (0, 5)))
    batch["action"][batch["is_pad"]] += 100
    for after in (core(batch), core(longer)):
        for key in ("flow_sum", "real_sum", "temporal_sum"):  # what follows a padded step is padded
            assert after[key].item() == pytest.approx(before[key].item(), rel=1e-5)


def test_temporal_loss_by_hand_and_its_gradient(make):
    core, _, batch = batch_of(make(), count=2)
    out, t = core(batch), batch["time"][:, None, None]
    x_t = t * batch["noise"] + (1 - t) * batch["action"]
    v = core.model.velocity(core.prefix(batch), x_t, batch["time"])
    clean = (x_t - t * v)[..., :6]
    assert out["temporal_sum"].item() == pytest.approx(((clean[:, 1:] - clean[:, :-1]) ** 2).sum().item(), rel=1e-5)
    out["temporal_sum"].backward()
    gradient = core.model.action_out_proj.weight.grad  # a loss of the recorded actions alone would have none
    assert gradient[:6].abs().sum() > 0 and gradient[6:].abs().sum() == 0  # padded dims are not smoothed


def test_the_loss_is_the_sum_of_its_parts_and_lambda_zero_is_plain_smolvla(make, plain, capsys):
    _, zero = train(make(training__lambda_temporal=0, steps=2, validation__val_freq=2))
    assert "[100.0%] Step 2/2 | Loss: " in (said := capsys.readouterr().out) and "[VAL] Step 2 | Loss: " in said
    for prefix in ("train", "val"):
        rows = [r for r in plain[2] + zero if f"{prefix}/loss" in r]
        parts = [r[f"{prefix}/action_loss"] + r[f"{prefix}/temporal_loss"] for r in rows]
        assert [r[f"{prefix}/loss"] for r in rows] == pytest.approx(parts, rel=1e-6)
        steps = 4 if prefix == "train" else 2
        assert [r[f"{prefix}/temporal_loss"] > 0 for r in rows] == [True] * steps + [False] * (steps // 2)
    names = {"train/grad_norm", "train/learning_rate", "train/steps_per_sec", "train/action_loss_real"}
    assert names | {"system/vram_allocated_gb", "system/ram_gb", "train/data_wait"} <= set(zero[0])


TRAINED = [dict(policy__train_expert_only=False), dict(policy__attention_mode="self_attn")]
TRAINED += [dict(policy__train_expert_only=False, policy__freeze_vision_encoder=False)]
TRAINED += [dict(train="lora", policy__train_expert_only=False)]
TRAINED += [dict(policy__num_vlm_layers=3, policy__num_expert_layers=1)]


@pytest.mark.parametrize("flags", TRAINED)
def test_every_trained_tensor_gets_a_gradient_whatever_is_trained(make, flags):
    """DDP waits for a gradient of every parameter that requires one."""
    core, _, batch = batch_of(make(**flags), count=1)
    core(batch)["flow_sum"].backward()
    wrong = [n for n, p in core.named_parameters() if p.requires_grad and (p.grad is None or p.dtype != torch.float32)]
    assert wrong == []


def test_bf16_autocast_is_close_to_fp32_and_keeps_state_action_and_time(make):
    """The path of a GPU, on the CPU: frozen weights and autocast bf16, but what a millimetre is lost in stays fp32."""
    exact, _, batch = batch_of(make(), count=4)
    half, _, _ = batch_of(make(), count=4, dtype=torch.bfloat16)
    trained = {p.dtype for p in half.parameters() if p.requires_grad}
    assert trained == {torch.float32} and half.model.vlm_with_expert.vlm.lm_head.weight.dtype == torch.bfloat16
    seen = {}
    for name in smolvla.HEADS:
        getattr(half.model, name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        out = half(batch)
    out["flow_sum"].backward()
    assert set(seen.values()) == {torch.float32} and len(seen) == 5
    assert out["flow_sum"].item() == pytest.approx(exact(batch)["flow_sum"].item(), rel=0.03)
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)


@pytest.mark.parametrize("flags", [{}, dict(policy__train_expert_only=False, policy__freeze_vision_encoder=False)])
def test_gradient_checkpointing_gives_the_same_gradients_for_less_memory(make, flags):
    losses, gradients, kept = [], [], []  # kept: bytes of activations that the backward pass was left
    for on in (False, True):
        core, _, batch = batch_of(make(training__gradient_checkpointing=on, **flags))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            loss = core.train()(batch)["flow_sum"]
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in core.named_parameters() if p.grad is not None})
        kept.append(sum(sizes))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and kept[1] < 0.6 * kept[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_rotary_tables_are_made_once_whatever_the_depth(make, monkeypatch):
    made, rotary = [], smolvla.rotary
    monkeypatch.setattr(smolvla, "rotary", lambda *args: made.append(1) or rotary(*args))
    for layers in (2, 3):
        core, _, batch = batch_of(make(policy__num_vlm_layers=layers))
        made.clear()
        core(batch)
        assert len(made) == 4  # images and text, state, two kinds of layer


# ---- spikes, EMA, LoRA, schedule -------------------------------------------------------------------------------------
def test_a_poisoned_episode_is_named_first(make, tmp_path, sim_root, capsys):
    """One frame's action x 100 in one of five episodes; the statistics are those of the clean recordings."""
    shutil.copytree(sim_root, tmp_path / "data")
    flags = dict(dataset__root_dir=tmp_path / "data", training__loss_spike_threshold=3, training__batch_size=3)
    flags |= dict(steps=75, scheduler__num_decay_steps=75, training__log_freq=25, training__save_freq=60)
    clean = smolvla.load_data(make(**flags))
    save_stats(tmp_path / "stats.yaml", clean.spec.stats)
    victim = clean.train[2]
    with h5py.File(clean.episodes[victim].path, "r+") as f:
        f["action"][6] *= 100
    cfg = make(normalization__stats_file=tmp_path / "stats.yaml", **flags)
    smolvla.main(cfg)
    table, text = (Path(cfg.output_dir) / f"loss_spikes.{kind}" for kind in ("csv", "txt"))
    rows = list(csv.DictReader(table.open(newline="")))
    assert rows and text.read_text().count("LOSS SPIKE (") == len(rows)
    for row in rows:
        assert json.loads(row["episode_indices"])[0] == victim
        assert json.loads(row["frame_indices"])[0] in (3, 4, 5, 6)  # chunks of 4 that contain frame 6
        assert row["episode_paths"].startswith(f"[{victim}] {clean.episodes[victim].path}")
        losses = json.loads(row["sample_losses"])
        assert len(losses) == 3 and losses[0] == max(losses) > 10 * min(losses)
        assert 3 < float(row["ratio"]) == pytest.approx(float(row["loss"]) / float(row["moving_avg"]), abs=0.01)
    said = capsys.readouterr().out
    assert f"⚠️  LOSS SPIKE at step {rows[0]['step']}: " in said and f"| Episodes: [{victim}" in said
    assert [str(r["step"]) for r in read_metrics(cfg.output_dir) if "spike/loss" in r] == [r["step"] for r in rows]
    before, step_60 = table.read_text(), Path(cfg.output_dir) / "checkpoints/checkpoint_step_60.pt"
    smolvla.main(dataclasses.replace(cfg, resume=str(step_60)))
    assert table.read_text() == before  # history and rows are part of the checkpoint


def test_spikes_begin_after_50_steps_and_compare_with_the_last_100(tmp_path, make):
    spikes = smolvla.Spikes(Run(make(), tmp_path, 1), 2.0, [])

    def check(loss):
        return spikes.check(dict(loss=loss, action_loss=loss, temporal_loss=0.0), [])

    assert all(check(loss) is None for loss in [1.0] * 48 + [50.0])  # 49 losses: too early
    spikes.state["history"] = [1.0] * 99
    assert check(3.0)[0]["spike/moving_avg"] == pytest.approx(1.02) and len(spikes.state["history"]) == 100
    assert check(2.0) is None  # the mean is now 1.03


def test_ema_is_what_is_validated_and_exported(make, plain, tmp_path):
    state, rows = train(make(training__ema_decay=0.9))
    same(state["model_state_dict"], plain[1]["model_state_dict"])  # the average does not disturb the training
    name = "model.action_out_proj.weight"
    assert torch.equal(state["policy_state_dict"][name], state["ema_state_dict"][name])
    assert not torch.equal(state["policy_state_dict"][name], state["model_state_dict"][name])
    assert rows[-1]["val/loss"] != plain[2][-1]["val/loss"]
    same(load_file(tmp_path / "run/checkpoints/final_hf/model.safetensors"), state["policy_state_dict"])


def test_lora_starts_as_the_base_resumes_merges_and_opens_with_peft(make, tmp_path):
    from peft import PeftModel

    base, _, batch = batch_of(make(), count=2)
    core, _, _ = batch_of(make(train="lora"), count=2)
    torch.testing.assert_close(core(batch)["flow_sum"], base(batch)["flow_sum"])
    trained = {n for n, p in core.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or n.split(".")[1] in smolvla.HEADS for n in trained)
    assert sum(".lora_A" in n for n in trained) == 2 * 7  # seven projections in each of two expert layers
    flags = dict(train="lora", lora_rank=4, lora_alpha=8, lora_dropout=0.2, training__ema_decay=0.5)
    straight, _ = train(make("straight", training__save_freq=2, **flags))
    folder = tmp_path / "straight/checkpoints"
    state, _ = train(make("resumed", resume=folder / "checkpoint_step_2.pt", **flags))
    for key in ("policy_state_dict", "model_state_dict", "ema_state_dict"):
        same(state[key], straight[key])
    merged = smolvla.load_policy(folder / "final_hf", "cpu").model(batch)["flow_sum"].item()
    assert merged != pytest.approx(base(batch)["flow_sum"].item(), rel=1e-4)
    opened = PeftModel.from_pretrained(base, folder / "final_adapter").eval()
    assert opened(batch)["flow_sum"].item() == pytest.approx(merged, rel=1e-4)


def test_learning_rate_by_hand_and_for_a_shorter_training(make):
    schedule = dict(scheduler__num_warmup_steps=4, scheduler__num_decay_steps=12, scheduler__peak_lr=1e-3)
    cfg = make(optimizer__lr=2e-3, scheduler__decay_lr=1e-4, **schedule)
    lrs = [smolvla.lr_at(k, 20, cfg) for k in (0, 3, 4, 8, 12, 10**6)]
    assert lrs == pytest.approx([5e-4, 2e-3, 2e-3, (2e-3 + 2e-4) / 2, 2e-4, 2e-4])
    assert smolvla.schedule(6, cfg) == (2, 6)
    assert [smolvla.lr_at(k, 6, cfg) for k in (0, 1, 2, 4, 6)] == pytest.approx([1e-3, 2e-3, 2e-3, 1.1e-3, 2e-4])


# ---- export, load, predict -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory, sim_root, vlm_dir):
    """(output_dir, config) of a finished short run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    flags = dict(policy__resize_imgs_with_padding="64 64", training__batch_size=4, optimizer__lr=2e-3, output_dir=out)
    flags |= dict(dataset__root_dir=sim_root, policy__vlm_model_name=vlm_dir, validation__num_samples=256)
    cfg = config(training__steps=30, scheduler__num_decay_steps=30, validation__num_episodes=2, **flags)
    smolvla.main(cfg)
    return out, cfg


def test_final_hf_has_lerobots_layout(trained, lerobot):
    """The files, fields and processor steps that LeRobot 0.4.4 wrote; fields that other versions lack are left out."""
    ours, theirs = trained[0] / "checkpoints/final_hf", lerobot[0]
    added = {"meta.json", "vlm", "example.safetensors", "check_in_lerobot.py"}
    assert {p.name for p in theirs.iterdir()} | added == {p.name for p in ours.iterdir()}
    a, b = (json.loads((folder / "config.json").read_text()) for folder in (ours, theirs))
    # what is left out of these versions' fields takes its default there
    absent = {k: b[k] for k in set(b) - set(a)}
    assert set(a) < set(b) and (absent.pop("n_obs_steps"), absent.pop("prefix_length")) == (1, -1)
    assert {k for k, v in absent.items() if v} == {"use_cache", "train_state_proj", "compile_mode"}
    assert a["input_features"].keys() == b["input_features"].keys() and a["output_features"] == b["output_features"]
    assert a["load_vlm_weights"] is True  # without it LeRobot 0.4.4 misplaces the patches of an image
    assert a["input_features"]["observation.images.camera1"] == {"type": "VISUAL", "shape": [3, 60, 80]}
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        shapes = []
        for folder in (ours, theirs):  # without values that belong to the data and sizes
            steps = json.loads((folder / name).read_text())["steps"]
            shapes.append([(s["registry_name"], s.get("state_file"), sorted(s["config"])) for s in steps])
        assert shapes[0] == shapes[1]
    for name in (smolvla.lerobot.NORMALIZER, smolvla.lerobot.UNNORMALIZER):
        p, q = load_file(ours / name), load_file(theirs / name)
        assert all(p[k].shape == q[k].shape and p[k].dtype == torch.float32 for k in q)
        assert set(p) - set(q) == {f"{k}.{s}" for k in ("action", "observation.state") for s in ("q01", "q99")}


def test_all_forms_of_a_policy_predict_the_same(trained, sim_root, tmp_path):
    """checkpoint, final_hf, output_dir, and what LeRobot's own files say, without ours."""
    out, folder = trained[0], tmp_path / "final_hf"
    forms = [out / "checkpoints/checkpoint_latest.pt", out / "checkpoints/final_hf", out]
    policies = [smolvla.load_policy(form, "cpu") for form in forms]
    episode = next(iter(policies[0].open_episodes(sim_root)))
    observations = [episode["sample"](t) for t in (0, 5, 11)]
    first = policies[0].predict(observations)
    assert first.shape == (3, 4, 6) and first.dtype == np.float32
    for policy in policies[1:]:
        np.testing.assert_array_equal(policy.predict(observations), first)
    shutil.copytree(forms[1], folder)
    (folder / "meta.json").unlink()
    told = [o | dict(instruction=trained[1].dataset.task_instruction) for o in observations]
    np.testing.assert_allclose(smolvla.load_policy(folder, "cpu").predict(told), first, atol=1e-5)
    stats = {f"so100.buffer.{k}": v for k, v in load_file(folder / smolvla.lerobot.NORMALIZER).items()}
    save_file(stats, folder / smolvla.lerobot.NORMALIZER)  # as in the published smolvla_base
    with pytest.raises(UserError, match="statistics of .*so100.buffer.action.*--init_from"):
        smolvla.load_policy(folder, "cpu")
    (folder / smolvla.lerobot.NORMALIZER).unlink()
    with pytest.raises(UserError, match="statistics of nothing.*--init_from"):
        smolvla.load_policy(folder, "cpu")


def test_an_export_can_be_checked_where_lerobot_is(trained, tmp_path, monkeypatch, capsys):
    """check_in_lerobot.py, with our own policy behind LeRobot's calls: the same answer passes, another one does not."""
    folder = shutil.copytree(trained[0] / "checkpoints/final_hf", tmp_path / "final_hf")

    class SmolVLAPolicy(torch.nn.Module):
        def __init__(self, source):
            super().__init__()
            self.ours, self.config = smolvla.load_policy(source, "cpu"), None
            self.model = self.ours.model

        from_pretrained = classmethod(lambda cls, source: cls(source))

        def predict_action_chunk(self, batch, noise):
            shown = {k.rpartition(".")[2]: v for k, v in batch.items() if "images" in k}
            images = {k: (v.permute(1, 2, 0) * 255).round().byte().numpy() for k, v in shown.items()}
            observation = dict(images=images, state=batch["observation.state"].numpy(), instruction=batch["task"])
            return torch.from_numpy(self.ours.predict([observation], noise))

    same = (lambda batch: batch), (lambda actions: actions)
    factory = SimpleNamespace(make_pre_post_processors=lambda config, pretrained_path, preprocessor_overrides: same)
    monkeypatch.setitem(sys.modules, "lerobot.policies.factory", factory)
    module = SimpleNamespace(SmolVLAPolicy=SmolVLAPolicy)
    monkeypatch.setitem(sys.modules, "lerobot.policies.smolvla.modeling_smolvla", module)
    monkeypatch.setattr(sys, "argv", ["check_in_lerobot.py", str(folder)])
    runpy.run_path(str(folder / "check_in_lerobot.py"))
    assert "LeRobot answers as the training did" in capsys.readouterr().out
    weights = load_file(folder / "model.safetensors")
    weights["model.action_out_proj.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="LeRobot answers differently"):
        runpy.run_path(str(folder / "check_in_lerobot.py"))


def test_the_policy_says_what_it_takes_and_gives(trained, sim_root):
    for form in ("checkpoints/checkpoint_latest.pt", "checkpoints/final_hf"):
        policy = smolvla.load_policy(trained[0] / form, "cpu")
        told = json.loads(json.dumps(policy.describe()))
        assert told["cameras"] == {f"camera{k}": dict(height=60, width=80) for k in (1, 2, 3)}
        units = dict(x="m", y="m", z="m", roll="rad", pitch="rad", yaw="rad")
        assert {c["name"]: c["unit"] for c in told["state"]} == units
        assert [c["name"] for c in told["actions"]] == [f"q{i}" for i in range(1, 7)] and told["kind"] == "absolute"
        assert all(c["low"] < c["high"] for c in told["actions"]) and told["horizon"] == 4 and told["rate_hz"] > 0
        assert told["instructions"] == [trained[1].dataset.task_instruction] and told["latency_ms"] > 0
        assert set(told["needs"]) >= {"weights that were not trained"} if form.endswith(".pt") else told["needs"] == {}
    observation = next(iter(policy.open_episodes(sim_root)))["sample"](3)
    with pytest.raises(UserError, match=r"shape \(3,\), the policy needs x \(m\), y \(m\)"):
        policy.predict([observation | dict(state=observation["state"][:3])])


def test_a_prediction_can_be_the_mean_of_several_draws(trained, sim_root):
    policy = smolvla.load_policy(trained[0], "cpu")
    episode = next(iter(policy.open_episodes(sim_root)))
    observations = [episode["sample"](t) for t in (0, 7)]
    noise = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(5))
    single = [policy.predict(observations, noise[:, k]) for k in range(3)]
    np.testing.assert_allclose(policy.predict(observations, noise.flatten(0, 1)), np.mean(single, 0), atol=1e-5)
    assert np.abs(single[0] - single[1]).max() > 1e-4
    one = policy.predict(observations)
    policy.collate.policy.noise_draws, seen = 3, []
    policy.model.model.vlm.vision_model.register_forward_hook(lambda *_: seen.append(1))
    several = policy.predict(observations)
    assert several.shape == one.shape and np.abs(several - one).max() > 1e-5 and len(seen) == 1


def test_validation_loss_on_the_whole_part_by_hand(trained):
    """val/* are sums over unpadded steps, not means of batch means."""
    out, cfg = trained
    last = [r for r in read_metrics(out) if "val/loss" in r][-1]
    policy, data = smolvla.load_policy(out, "cpu"), smolvla.load_data(cfg)
    dataset = smolvla.SmolVLADataset(data, data.validation, cfg)
    flow = real = steps = error = 0.0
    for i in range(len(dataset)):
        item = dataset[(i, i)]
        batch, n = policy.collate([item]), int((~item["is_pad"]).sum())
        result = policy.model(batch)
        flow, real, steps = flow + result["flow_sum"].item() / 8, real + result["real_sum"].item() / 6, steps + n
        error += np.abs(policy.decode(batch)[0] - item["action"])[:n].sum()
    assert last["val/action_loss"] == pytest.approx(flow / steps, rel=1e-4)
    assert last["val/action_loss_real"] == pytest.approx(real / steps, rel=1e-4)
    assert last["val/action_mae_rad"] == pytest.approx(error / steps / 6, rel=1e-4)


class Eyes:
    """A policy that answers with the brightness of its cameras, each with a weight of its own."""

    def __init__(self, spec, weights):
        self.spec, self.weights, self.collate = spec, weights, SimpleNamespace(inputs=lambda items: items)

    def decode(self, items):
        """The recorded action, plus the share that comes from the images and what their owner's would be."""
        out = []
        for item in items:
            own = sum(w * image.mean() for w, image in zip(self.weights, item["images"], strict=True))
            out.append(item["action"] + 0.1 + 0.01 * (own - item["truth"]))
        return np.stack(out)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 0, 0)])
def test_a_camera_that_is_not_looked_at_is_named(make, weights):
    cfg = make(validation__num_episodes=3)
    data = smolvla.load_data(cfg)
    dataset = smolvla.SmolVLADataset(data, data.validation, cfg)

    class Bright:
        spec, episodes, locate = data.spec, dataset.episodes, dataset.locate

        def __getitem__(self, key):
            item, shade = dataset[key], np.uint8(40 * self.locate(key[1])[0] + 10)
            images = [np.full_like(image, shade) for image in item["images"]]
            return item | dict(images=images, truth=sum(w * shade for w in weights))

    run = SimpleNamespace(rank=0, world=1, sum=lambda *values: list(values))
    values = smolvla.swap_cameras(Eyes(data.spec, weights), Bright(), list(range(0, len(dataset), 3)), 4, run)
    assert list(values) == [f"val/swap_ratio_{c}_camera" for c in ("side", "tool", "top")]
    looked = [ratio > 1.05 for ratio in values.values()]
    assert looked == [w > 0 for w in weights] and values["val/swap_ratio_top_camera"] == pytest.approx(1)
    shown = {"val/loss": 1.0, "val/action_loss": 1.0, "val/action_mae_rad": 0.5} | values
    line = smolvla.validation_line(SimpleNamespace(number=3), shown, [("q1", "rad")])
    assert "[VAL] Step 3 | Loss: 1.0000 | Action Loss: 1.0000 | Action MAE: 0.5 rad" in line
    assert line.count("warning") == looked.count(False) and "hardly looks at top_camera" in line
    alone = smolvla.SmolVLADataset(data, data.validation[:1], cfg)
    assert smolvla.swap_cameras(Eyes(data.spec, weights), alone, [0, 5], 4, run) == {}


# ---- data ------------------------------------------------------------------------------------------------------------
def test_the_command_in_the_error_makes_statistics_that_fit(make, tmp_path, monkeypatch):
    """Also where the run's split and state are not those of a ready-made YAML file."""
    flags = dict(normalization__stats_file=tmp_path / "it's/dataset_stats_sim.yaml", dataset__use_qpos=True, seed=3)
    cfg = make(validation__num_episodes=2, policy__max_state_dim=16, **flags)
    everything = make(validation__enable=False, dataset__use_qpos=True, policy__max_state_dim=16)
    save_stats(tmp_path / "seen.yaml", smolvla.load_data(everything).spec.stats)
    save_stats(tmp_path / "pose.yaml", smolvla.load_data(make(validation__num_episodes=2, seed=3)).spec.stats)
    save_stats(tmp_path / "foreign.yaml", smolvla.load_data(everything).spec.stats | dict(episodes=["elsewhere.h5"]))
    with pytest.raises(UserError, match="other data"):
        smolvla.load_data(make(validation__enable=False, normalization__stats_file=tmp_path / "foreign.yaml"))
    monkeypatch.chdir(tmp_path)
    for before, message in ((None, "sim.yaml not found"), ("seen.yaml", "validates on"), ("pose.yaml", "6 dims")):
        if before:
            shutil.copy(tmp_path / before, cfg.normalization.stats_file)
        with pytest.raises(UserError, match=message) as error:
            smolvla.load_data(cfg)
        argv = shlex.split(str(error.value).partition(f"python {os.path.relpath(compute_stats.__file__)} ")[2])
        compute_stats.main(parse_config(compute_stats.Config, argv, partial=True))
        read = smolvla.load_data(cfg).spec.stats
        assert len(read["excluded_episodes"]) == 2 and len(read["observation.state"]["mean"]) == 12


def test_cameras_come_in_the_order_of_the_config(make):
    data, plain = smolvla.load_data(make(dataset__cameras="top_camera camera1")), smolvla.load_data(make())
    assert (data.spec.cameras, len(plain.spec.cameras)) == (["top_camera", "side_camera"], 3)
    a, b = (smolvla.SmolVLADataset(d, d.train, make())[(0, 3)]["images"] for d in (data, plain))
    assert np.array_equal(a[0], b[2]) and np.array_equal(a[1], b[0]) and len(a) == 2


def test_state_noise_and_dropout_by_position_and_only_in_training(make):
    quiet, loud = make(), make(dataset__state_noise=0.5, dataset__state_dropout=0.5)
    data = smolvla.load_data(quiet)
    plain, off = smolvla.SmolVLADataset(data, data.train, quiet, True), smolvla.SmolVLADataset(data, data.train, loud)
    on, stats = smolvla.SmolVLADataset(data, data.train, loud, True), data.spec.stats["observation.state"]
    clean = plain[(0, 3)]["state"]
    for same_state in (off[(0, 3)]["state"], data.episodes[data.train[0]].ee_pose[3]):
        np.testing.assert_array_equal(same_state, clean)
    states = np.stack([on[(p, 3)]["state"] for p in range(300)])
    assert states.dtype == np.float32 and np.array_equal(on[(7, 3)]["state"], states[7])
    dropped = (states == np.float32(stats["mean"])).all(1)
    assert 110 < dropped.sum() < 190
    moves = np.asarray(stats["std"]) > 1e-6
    share = (states[~dropped] - clean)[:, moves].std(0) / np.asarray(stats["std"])[moves]
    np.testing.assert_allclose(share, 0.5, rtol=0.3)


def test_a_policy_without_any_state(make, sim_root, tmp_path, capsys):
    """LeRobot's format wants a state: it is one dimension that is always 0."""
    cfg = make(dataset__use_ee_pose=False, steps=2, normalization__stats_file=tmp_path / "stats.yaml")
    with pytest.raises(UserError) as error:
        smolvla.load_data(cfg)
    argv = shlex.split(str(error.value).partition("compute_stats.py ")[2])
    compute_stats.main(parse_config(compute_stats.Config, argv, partial=True))
    train(cfg)
    assert "state     none: the model sees images and text only" in capsys.readouterr().out
    folder = tmp_path / "run/checkpoints/final_hf"
    assert json.loads((folder / "config.json").read_text())["input_features"]["observation.state"]["shape"] == [1]
    policy = smolvla.load_policy(folder, "cpu")
    observation = next(iter(policy.open_episodes(sim_root)))["sample"](3)
    assert policy.describe()["state"] == []
    np.testing.assert_array_equal(*(policy.predict([o]) for o in (observation, observation | dict(state=None))))


def test_a_training_from_the_frame_store_is_the_same_training(make, plain, tmp_path, monkeypatch):
    for out in ("built", "again"):
        stored, _ = train(make(out, dataset__frame_dir=tmp_path / "frames"))
        same(stored["policy_state_dict"], plain[1]["policy_state_dict"])
        monkeypatch.setattr(smolvla.ep.FrameStore, "_build_one", lambda *_: pytest.fail("it is there"))


def test_check_prints_the_batch_and_needs_no_weights(make, capsys, tmp_path):
    smolvla.main(make(check=True))
    said = capsys.readouterr().out
    wanted = ["4 training episodes, 48 frames; 1 validation episodes", "side_camera -> camera1 60x80"]
    wanted += ["q1 .. q6 (action), 6 dims", "tokens         (2, 20)", "check passed"]
    wanted += ["'Insert needle into eye trocar in simulation\\n"]
    assert [words for words in wanted if words not in said] == [] and "cuts" not in said
    smolvla.main(make(check=True, policy__tokenizer_max_length=4))
    assert "policy.tokenizer_max_length 4 cuts the end of 'Insert needle" in capsys.readouterr().out
    smolvla.main(make(check=True, policy__vlm_model_name=tmp_path / "nowhere"))
    assert "tokens are not shown" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
