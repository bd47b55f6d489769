"""SmolVLA: parity with what LeRobot computed (../shared/fixtures), the training's promises, and the exported format."""
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import make_demo
import train_smolvla_sim as smolvla
from common.config import parse_config
from common.runlog import read_metrics


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
    items = [o | dict(action=io["raw.action"][b], is_pad=np.zeros(10, bool), noise=io["noise"][b], time=float(io["time"][b]), name=(0, "", b)) for b, o in enumerate(observations)]
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
        model = smolvla.SmolVLA(config, cfg.policy, 6)
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


# ---- a tiny run ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def sim_root(tmp_path_factory):
    """5 episodes of 12 frames in the simulator's form: joint targets, metres, no instruction."""
    folder = tmp_path_factory.mktemp("sim")
    make_demo.write_insertion(folder, episodes=5, size=(60, 80), max_frames=12, position_unit="m", action="joints", instruction=False)
    return folder


@pytest.fixture(scope="session")
def vlm_dir(tmp_path_factory):
    return make_demo.write_smolvlm2(tmp_path_factory.mktemp("smolvlm2"), text=(48, 3), vision=(32, 2), image_size=64)


@pytest.fixture
def make(tmp_path, sim_root, vlm_dir):
    """make(out, **flags) -> Config of a tiny run into tmp_path/out; a flag's dot is written as two underscores."""
    def make(out="run", **flags):
        base = dict(dataset__root_dir=sim_root, dataset__horizon=4, policy__chunk_size=4, policy__n_action_steps=4, policy__vlm_model_name=vlm_dir, policy__num_vlm_layers=2,
                    policy__resize_imgs_with_padding="[32,32]", policy__max_state_dim=8, policy__max_action_dim=8, policy__tokenizer_max_length=20, policy__num_steps=3, training__batch_size=2,
                    training__num_workers=0, training__steps=4, training__log_freq=1, training__save_freq=100, validation__num_episodes=1, validation__val_freq=100, validation__num_samples=4,
                    optimizer__lr=1e-3, scheduler__num_warmup_steps=2, scheduler__num_decay_steps=8, output_dir=tmp_path / out)
        argv = [word for k, v in (base | flags).items() for word in (f"--{k.replace('__', '.')}", str(v))]
        return parse_config(smolvla.Config, argv, smolvla.ALIASES)
    return make


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing takes longer than a tiny run; test_checkpoint_files_and_their_step looks at the real picture."""
    monkeypatch.setattr(smolvla.runlog, "plot_loss", lambda *_: "")


def train(cfg):
    """Run main -> (state of the last checkpoint, metrics rows)."""
    smolvla.main(cfg)
    return torch.load(Path(cfg.output_dir) / "checkpoints/checkpoint_latest.pt", weights_only=True), read_metrics(cfg.output_dir)


def same(a, b):
    """Every tensor of two (nested) dicts is bitwise equal."""
    assert a.keys() == b.keys()
    for k in a:
        same(a[k], b[k]) if isinstance(a[k], dict) else torch.testing.assert_close(a[k], b[k], rtol=0, atol=0, msg=lambda m, k=k: f"{k}: {m}")


def close(a, b, atol):
    """Equal up to rounding. Train with optimizer.eps 1e-2: a smaller one makes Adam's first steps +-lr whatever the gradient's size."""
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=0, atol=atol, msg=lambda m, k=k: f"{k}: {m}")


def batch_of(cfg, count=4, start=0):
    """(core model, collate, batch) with `count` samples of a config's training data."""
    data = smolvla.load_data(cfg)
    vlm_config, tokenizer = smolvla.open_vlm_files(smolvla.read_vlm_files(cfg.policy.vlm_model_name))
    core, _ = smolvla.build_model(cfg, vlm_config, data.spec, torch.device("cpu"), torch.float32)
    dataset, collate = smolvla.SmolVLADataset(data, data.train, cfg), smolvla.Collate(tokenizer, cfg.policy, data.spec, data.stats)
    return core, collate, collate([dataset[(i, i)] for i in range(start, start + count)])


# ---- run, stop, resume -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [dict(training__ema_decay=0.9), dict(training__num_workers=2, training__gradient_accumulation_steps=2, train="lora", lora_dropout=0.2, training__ema_decay=0.9)],
                         ids=["full-ema-0-workers", "lora-accumulation-2-workers"])
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(make, flags, monkeypatch):
    straight, _ = train(make("straight", **flags))
    step = smolvla.runlog.RunLog.step

    def kill_at_2(self, number, *args):
        step(self, number, *args)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as m:
        m.setattr(smolvla.runlog.RunLog, "step", kill_at_2)
        stopped, _ = train(make("stopped", **flags))
    assert stopped["step"] == 3                                              # the signal came while step 2 was logged: the step after it is finished and saved
    resumed, rows = train(make("stopped", resume="auto", **flags))
    for key in ("policy_state_dict", "model_state_dict", "ema_state_dict", "optimizer_state_dict"):
        same(resumed[key], straight[key])
    assert resumed["position"] == straight["position"] and resumed["spike_history"] == straight["spike_history"]
    assert [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3, 4]


def test_checkpoint_files_and_their_step(make, monkeypatch):
    monkeypatch.undo()
    cfg = make(training__steps=4, training__save_freq=2)
    train(cfg)
    folder = Path(cfg.output_dir) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint_latest.pt", "checkpoint_step_2.pt", "checkpoint_step_4.pt", "final_hf", "meta.json"]
    two, four = (torch.load(folder / f"checkpoint_step_{n}.pt", weights_only=True) for n in (2, 4))
    assert two["step"] == 2 and four["step"] == 4
    same(torch.load(folder / "checkpoint_latest.pt", weights_only=True)["policy_state_dict"], four["policy_state_dict"])
    short, _ = train(make("short", training__steps=2))
    same(two["policy_state_dict"], short["policy_state_dict"])               # step_2 holds the weights after update 2
    assert {"loss.png", "loss_spikes.csv", "loss_spikes.txt", "validation_episodes.txt", "metrics.jsonl", "config.yaml", "dataset_stats.yaml"} <= {p.name for p in Path(cfg.output_dir).iterdir()}


def test_keep_checkpoints_deletes_the_oldest(make):
    cfg = make(training__save_freq=1, training__keep_checkpoints=2, validation__enable=False)
    train(cfg)
    assert list(smolvla.ckpt.steps_in(Path(cfg.output_dir) / "checkpoints", smolvla.STEP_FILE)) == [3, 4]


def test_resume_of_another_data_set_is_a_new_run_from_the_weights(make, tmp_path, capsys):
    """Guide 2, stage 3: --resume X --steps N --lr L with another config."""
    old, _ = train(make("sim"))
    make_demo.write_insertion(tmp_path / "real", episodes=4, seed=7, size=(60, 80), max_frames=10, position_unit="m", action="joints", instruction=False)
    latest = tmp_path / "sim/checkpoints/checkpoint_latest.pt"
    new, rows = train(make("real_run", dataset__root_dir=tmp_path / "real", resume=latest, steps=3, lr=1e-5))
    said = capsys.readouterr().out
    assert "NEW RUN from its weights" in said and "3 steps from 0" in said and "peak lr 1e-05" in said
    assert new["step"] == 3 and [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3]
    assert max(r["train/learning_rate"] for r in rows if "train/loss" in r) == pytest.approx(1e-5)
    assert new["normalization_stats"] != old["normalization_stats"] and new["normalization_stats"]["num_episodes"] == 3
    moved = max((new["policy_state_dict"][k] - v).abs().max().item() for k, v in old["policy_state_dict"].items())
    assert 0 < moved < 4e-5                                                  # three Adam steps of at most 1e-5 from the old weights


def test_reset_scheduler_keeps_weights_and_moments_and_warms_up_again(make, tmp_path):
    first, rows = train(make("run", scheduler__num_warmup_steps=4))
    second, after = train(make("again", steps=6, scheduler__num_warmup_steps=4, resume=tmp_path / "run/checkpoints/checkpoint_latest.pt", reset_scheduler=True))
    lrs = [r["train/learning_rate"] for r in rows + after if "train/loss" in r]
    assert lrs == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 2.5e-4, 5e-4])
    plain, _ = train(make("plain", steps=6, scheduler__num_warmup_steps=4, resume=tmp_path / "run/checkpoints/checkpoint_latest.pt"))
    name = next(iter(second["optimizer_state_dict"]))
    assert second["optimizer_state_dict"][name]["step"] == plain["optimizer_state_dict"][name]["step"] == 6   # moments went on
    assert second["schedule_start"] == 4
    third, rest = train(make("third", steps=7, scheduler__num_warmup_steps=4, resume=tmp_path / "again/checkpoints/checkpoint_latest.pt"))
    assert [r["train/learning_rate"] for r in rest if "train/loss" in r] == pytest.approx([7.5e-4])   # the restarted schedule goes on


def test_init_from_starts_from_exactly_these_weights(make, tmp_path):
    first, _ = train(make("run", training__ema_decay=0.5, train="lora"))
    for source in ("checkpoint_latest.pt", "final_hf"):
        cfg = make(source, init_from=tmp_path / "run/checkpoints" / source, lr=0.0, steps=1)
        state, _ = train(cfg)
        same(state["policy_state_dict"], first["policy_state_dict"])
        assert state["step"] == 1


def test_a_lerobot_policy_can_be_fine_tuned(make, lerobot):
    sizes = dict(policy__vlm_model_name=lerobot[0].parent / "vlm", policy__num_vlm_layers=4, policy__resize_imgs_with_padding="[64,64]", policy__tokenizer_max_length=12)
    state, _ = train(make(policy__pretrained_model_id=lerobot[0], lr=0.0, steps=1, **sizes))
    theirs = smolvla.read_policy_weights(lerobot[0])
    same(state["policy_state_dict"], theirs)
    with pytest.raises(ValueError, match="covers .* Nothing was loaded"):
        train(make("wrong", policy__pretrained_model_id=lerobot[0], **(sizes | dict(policy__num_vlm_layers=2))))


def test_a_resume_that_would_mean_something_else_is_refused(make):
    train(make(steps=2))
    for flags, message in (
        (dict(seed=1), "episodes changed"),                                  # the seed draws the split
        (dict(validation__num_episodes=2), "episodes changed"),
        (dict(train="lora"), "train full, now lora"),
        (dict(training__loss_dims="real"), "loss_dims all, now real"),
        (dict(normalization__mode="MIN_MAX"), "normalization MEAN_STD, now MIN_MAX"),
        (dict(policy__chunk_size=5, dataset__horizon=5), "policy.chunk_size 4, now 5"),
        (dict(steps=2), "nothing is left to do"),
        (dict(init_from="x"), "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            smolvla.main(make(**(dict(resume="auto", steps=6) | flags)))


def test_an_existing_run_is_not_overwritten(make):
    train(make(steps=1))
    with pytest.raises(FileExistsError, match="--resume auto"):
        smolvla.main(make(steps=1))
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        smolvla.main(make("other", resume="nowhere.pt"))


def test_a_random_frozen_vlm_is_refused_unless_asked_for(make):
    with pytest.raises(ValueError, match="allow_random_frozen_vlm"):
        smolvla.main(make(policy__load_vlm_weights=False))
    state, _ = train(make("asked", policy__load_vlm_weights=False, policy__allow_random_frozen_vlm=True, steps=1))
    everything, _ = train(make("all", policy__load_vlm_weights=False, policy__train_expert_only=False, policy__freeze_vision_encoder=False, steps=1))
    assert len(everything["optimizer_state_dict"]) > len(state["optimizer_state_dict"])


def test_a_frozen_vlm_starts_from_its_own_file_and_stays(make, vlm_dir):
    state, _ = train(make())
    file = smolvla.read_safetensors(vlm_dir)
    prefix = "model.vlm_with_expert.vlm."
    kept = {k.removeprefix(prefix): v for k, v in state["policy_state_dict"].items() if k.startswith(prefix)}
    assert "model.text_model.layers.2.mlp.up_proj.weight" in file and "model.text_model.layers.2.mlp.up_proj.weight" not in kept   # layer 2 is not used
    same(kept, {k: v for k, v in file.items() if ".layers.2." not in k})
    assert not any(k.startswith(prefix) for k in state["optimizer_state_dict"])


# ---- equal gradients -------------------------------------------------------------------------------------------------

def test_accumulation_equals_one_big_batch(make):
    """Batches with padded tails: the loss is divided by the unpadded steps of the whole optimizer step."""
    big, rows = train(make("big", training__batch_size=4, optimizer__eps=1e-2))
    small, micro_rows = train(make("small", training__batch_size=1, training__gradient_accumulation_steps=4, optimizer__eps=1e-2))
    close(small["policy_state_dict"], big["policy_state_dict"], 2e-6)
    for a, b in zip(rows, micro_rows):
        for key in ("train/loss", "train/action_loss", "train/temporal_loss", "train/grad_norm"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4)


def test_two_ranks_equal_one_rank_with_twice_the_batch(make, tmp_path, capfd):
    """The real launcher (gloo, CPU): same weights, losses and validation; disjoint samples, each rank its own noise."""
    flags = dict(steps=3, training__save_freq=2, validation__num_samples=7, optimizer__eps=1e-2)
    one, rows = train(make("one", training__batch_size=4, **flags))
    cfg = make("two", training__batch_size=2, **flags)
    smolvla.save_config(cfg, tmp_path / "two.yaml")
    env = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_smolvla_sim.py", "--config", str(tmp_path / "two.yaml")],
                   cwd=Path(smolvla.__file__).parent, env=env, check=True, capture_output=True, timeout=300)
    two = torch.load(tmp_path / "two/checkpoints/checkpoint_latest.pt", weights_only=True)
    close(two["policy_state_dict"], one["policy_state_dict"], 2e-6)
    for a, b in zip(rows, read_metrics(tmp_path / "two")):
        assert a["step"] == b["step"]
        for key in ("train/loss", "train/grad_norm", "val/loss", "val/action_mae"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4), key
    # one rank continues what two ranks began
    resumed, _ = train(make("one_again", training__batch_size=4, resume=tmp_path / "two/checkpoints/checkpoint_step_2.pt", **flags))
    close(resumed["policy_state_dict"], one["policy_state_dict"], 2e-6)


def test_noise_and_time_belong_to_the_position(make):
    cfg = make()
    data = smolvla.load_data(cfg)
    dataset = smolvla.SmolVLADataset(data, data.train, cfg)
    a, again, other = dataset[(0, 5)], dataset[(0, 5)], dataset[(1, 5)]
    assert np.array_equal(a["noise"], again["noise"]) and a["time"] == again["time"]
    assert not np.array_equal(a["noise"], other["noise"]) and a["time"] != other["time"]
    noise = np.stack([dataset[(p, 0)]["noise"] for p in range(300)])
    times = np.array([dataset[(p, 0)]["time"] for p in range(300)])
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert 0.001 <= times.min() and times.max() <= 1 and abs(times.mean() - (0.001 + 0.999 * 0.6)) < 0.05    # Beta(1.5, 1) has mean 0.6


def test_weighted_shares(make, tmp_path):
    for k, name in enumerate(("a", "b")):
        make_demo.write_insertion(tmp_path / "mix" / name, episodes=1 + 2 * k, seed=k, size=(60, 80), max_frames=10, position_unit="m", action="joints")
    cfg = make(dataset__root_dir=tmp_path / "mix", dataset__weights="{a: 0.3, b: 0.7}", validation__enable=False)
    data = smolvla.load_data(cfg)
    dataset = smolvla.SmolVLADataset(data, data.train, cfg)
    order = smolvla.GlobalOrder(len(dataset), cfg.seed, dataset.sample_weights())
    names = [dataset.episodes[dataset.locate(order.index(p))[0]].name for p in range(2000)]
    assert np.mean([n.startswith("a/") for n in names]) == pytest.approx(0.3, abs=0.01)
    with pytest.raises(ValueError, match="dataset.weights"):
        smolvla.SmolVLADataset(data, data.train, make(dataset__weights="{a: 0.3, c: 0.7}")).sample_weights()


# ---- loss ------------------------------------------------------------------------------------------------------------

def test_padding_changes_no_loss(make):
    core, _, batch = batch_of(make(), count=2, start=9)                      # frames 9 and 10 of 12: chunks of 4 run past the end
    assert batch["is_pad"].any() and not batch["is_pad"].all(1).any()
    before = core(batch)
    batch["action"][batch["is_pad"]] += 100
    after = core(batch)
    for key in ("flow_sum", "real_sum", "temporal_sum"):
        assert after[key].item() == pytest.approx(before[key].item(), rel=1e-6)   # the actions after a padded step are padded too, and the expert is causal
    longer = {**batch, "tokens": torch.nn.functional.pad(batch["tokens"], (0, 5), value=3), "token_mask": torch.nn.functional.pad(batch["token_mask"], (0, 5))}
    assert core(longer)["flow_sum"].item() == pytest.approx(before["flow_sum"].item(), rel=1e-5)


def test_temporal_loss_by_hand_and_its_gradient(make):
    core, _, batch = batch_of(make(), count=2)
    out = core(batch)
    t = batch["time"][:, None, None]
    x_t = t * batch["noise"] + (1 - t) * batch["action"]
    v = core.model.velocity(core.prefix(batch), x_t, batch["time"])
    clean = (x_t - t * v)[..., :6]
    assert out["temporal_sum"].item() == pytest.approx(((clean[:, 1:] - clean[:, :-1]) ** 2).sum().item(), rel=1e-5)
    out["temporal_sum"].backward()
    assert core.model.action_out_proj.weight.grad[:6].abs().sum() > 0        # a loss of the recorded actions alone would have none
    assert core.model.action_out_proj.weight.grad[6:].abs().sum() == 0       # padded dims are not smoothed


def test_lambda_zero_is_plain_smolvla(make):
    plain, rows = train(make("plain", training__lambda_temporal=0, steps=2))
    smooth, other = train(make("smooth", training__lambda_temporal=0.5, steps=2))
    assert all(r["train/temporal_loss"] == 0 for r in rows if "train/loss" in r) and all(r["train/temporal_loss"] > 0 for r in other if "train/loss" in r)
    name = "model.action_out_proj.weight"
    assert not torch.equal(plain["policy_state_dict"][name], smooth["policy_state_dict"][name])
    core, _, batch = batch_of(make(training__lambda_temporal=0.0), count=2)
    out = core(batch)
    assert out["sample_loss"].mean().item() == pytest.approx(out["flow_sum"].item() / (2 * 4 * 8), rel=1e-5)   # chunks of 4 steps x 8 dims, nothing padded


def test_loss_dims_real_trains_only_real_dims_and_pins_the_rest(make):
    core, _, batch = batch_of(make(training__loss_dims="real"), count=2)
    out = core(batch)
    assert out["dims"] == 6 and out["flow_sum"].item() == pytest.approx(out["real_sum"].item())
    out["flow_sum"].backward()
    assert core.model.action_out_proj.weight.grad[6:].abs().sum() == 0
    seen = []
    velocity = core.model.velocity
    core.model.velocity = lambda prefix, x, t: seen.append((x.clone(), t[0].item())) or velocity(prefix, x, t)
    core.sample(batch, batch["noise"])
    assert len(seen) == 3
    for x, t in seen:
        torch.testing.assert_close(x[..., 6:], t * batch["noise"][..., 6:])


def test_the_frozen_prefix_records_no_gradient_and_the_gradients_are_the_same(make):
    core, _, batch = batch_of(make(), count=2)
    assert not core.features(batch["images"], 3).requires_grad
    core(batch)["flow_sum"].backward()
    frozen = {n: p.grad.clone() for n, p in core.named_parameters() if p.grad is not None}
    assert all(p.grad is not None for p in core.parameters() if p.requires_grad)
    core.requires_grad_(True)
    core.zero_grad()
    core(batch)["flow_sum"].backward()
    for name, grad in frozen.items():
        torch.testing.assert_close(core.get_parameter(name).grad, grad, rtol=1e-5, atol=1e-6)


def test_every_trained_tensor_gets_a_gradient_whatever_is_trained(make):
    """DDP waits for a gradient of every parameter that requires one."""
    for flags in (dict(policy__train_expert_only=False), dict(policy__train_expert_only=False, policy__freeze_vision_encoder=False), dict(train="lora"),
                  dict(train="lora", policy__train_expert_only=False), dict(policy__train_state_proj=False), dict(policy__attention_mode="self_attn"), dict(policy__num_vlm_layers=3, policy__num_expert_layers=1)):
        core, _, batch = batch_of(make(**flags), count=1)
        core(batch)["flow_sum"].backward()
        assert [n for n, p in core.named_parameters() if p.requires_grad and p.grad is None] == [], flags


def test_the_state_reaches_the_actions_but_not_the_image_tokens(make):
    core, _, batch = batch_of(make(), count=2)
    valid, kv = core.prefix(batch)
    other, kv2 = core.prefix(batch | dict(state=batch["state"] + 1))
    assert torch.equal(kv[0][0][:, :, :-1], kv2[0][0][:, :, :-1]) and not torch.equal(kv[0][0][:, :, -1], kv2[0][0][:, :, -1])


def test_overfits_one_batch(make):
    torch.manual_seed(0)
    core, _, batch = batch_of(make(), count=2)
    optimizer = torch.optim.AdamW([p for p in core.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(150):
        out = core(batch)
        out["flow_sum"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out["sample_loss"].mean().item())
    assert losses[-1] < 0.1 * losses[0]
